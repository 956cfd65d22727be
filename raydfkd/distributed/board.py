"""Where a training's first rank, its driver and the synthesis leave each other word.

A module of its own, so that the actor starts without torch while the workers want the processors.
"""


class ProgressBoard:
    """The learning curve on its way to the driver, the driver's word that it is to end, and the newest student."""

    def __init__(self) -> None:
        self._entries: list[dict[str, float]] = []
        self._is_over = self._is_heard = False
        self._controller = list[object]()
        self._version, self._weights = -1, list[object]()

    def pin(self, entry: dict[str, float]) -> None:
        """Add an entry."""
        self._entries.append(entry)

    def take(self) -> list[dict[str, float]]:
        """Entries since the last call."""
        entries, self._entries = self._entries, []
        return entries

    def meet(self, controller: list[object]) -> None:
        """Remember the actor that controls the training, in a list."""
        self._controller = controller

    def controller(self) -> list[object]:
        """That actor, once it runs."""
        return self._controller

    def end(self) -> bool:
        """Ask the training to make a checkpoint and end; returns whether it has begun and will hear of it."""
        self._is_over = True
        return self._is_heard

    def is_over(self) -> bool:
        """Whether that was asked."""
        self._is_heard = True
        return self._is_over

    def announce(self, version: int, weights: list[object]) -> None:
        """Pin a version of the student; one that a resumed training makes again does not replace a higher one.

        Args:
            version: its number.
            weights: a reference to them, in a list because Ray would fetch what a bare one refers to.
        """
        if version > self._version:
            self._version, self._weights = version, weights

    def newest(self, than: int) -> tuple[int, list[object]]:
        """The highest version pinned, -1 for none; and the reference, if it is newer ``than`` that."""
        return self._version, self._weights if self._version > than else []
