"""Where a training's first rank pins its learning curve for the driver to read.

A module of its own, so that the actor starts without torch while the workers want the processors.
"""


class ProgressBoard:
    """The learning curve on its way to the driver."""

    def __init__(self) -> None:
        self._entries: list[dict[str, float]] = []

    def pin(self, entry: dict[str, float]) -> None:
        """Add an entry."""
        self._entries.append(entry)

    def take(self) -> list[dict[str, float]]:
        """Entries since the last call."""
        entries, self._entries = self._entries, []
        return entries
