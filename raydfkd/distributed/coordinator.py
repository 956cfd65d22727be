"""Mailbox actor between the Train workers and the driver.

A module of its own, so that the actor starts without torch while the workers want the processors.
"""

from __future__ import annotations


class Coordinator:
    """The learning curve on its way to the driver, and the driver's word that the training is to end."""

    def __init__(self) -> None:
        self._entries: list[dict[str, float]] = []
        self._lines: list[str] = []
        self._last_step = 0
        self._is_over = self._is_heard = False
        self._controller = list[object]()

    def pin(self, entry: dict[str, float]) -> None:
        """Add an entry of the curve."""
        self._entries.append(entry)
        self._last_step = int(entry["step"])

    def take(self) -> list[dict[str, float]]:
        """Entries since the last call."""
        entries, self._entries = self._entries, []
        return entries

    def last_step(self) -> int:
        """Step of the latest entry, 0 before the first."""
        return self._last_step

    def say(self, line: str) -> None:
        """Leave a line for people."""
        self._lines.append(line)

    def take_lines(self) -> list[str]:
        """Lines since the last call."""
        lines, self._lines = self._lines, []
        return lines

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
