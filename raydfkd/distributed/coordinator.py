"""Mailbox actor between the Train workers and the driver.

A module of its own, so that the actor starts without torch while the workers want the processors.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Letters:
    """What has come for the driver."""

    entries: list[dict[str, float]]
    """Entries of the learning curve."""
    lines: list[str]
    """Lines for people."""
    controller: list[object]
    """The actor that controls the training, in a list; empty before it runs."""
    is_waiting: bool
    """Whether the workers wait for images."""


class Coordinator:
    """The learning curve on its way to the driver, and the driver's word that the training is to end."""

    def __init__(self) -> None:
        self._entries: list[dict[str, float]] = []
        self._lines: list[str] = []
        self._last_step = 0
        self._is_over = self._is_heard = self._is_waiting = False
        self._controller = list[object]()

    def pin(self, entry: dict[str, float]) -> None:
        """Add an entry of the curve."""
        self._entries.append(entry)
        self._last_step = int(entry["step"])

    def say(self, line: str) -> None:
        """Leave a line for people."""
        self._lines.append(line)

    def take(self) -> Letters:
        """What has come since the last call."""
        letters = Letters(
            entries=self._entries, lines=self._lines, controller=self._controller, is_waiting=self._is_waiting
        )
        self._entries, self._lines = [], []
        return letters

    def last_step(self) -> int:
        """Step of the latest entry, 0 before the first."""
        return self._last_step

    def meet(self, controller: list[object]) -> None:
        """Remember the actor that controls the training, in a list."""
        self._controller = controller

    def end(self) -> bool:
        """Ask the training to make a checkpoint and end; returns whether it has begun and will hear of it."""
        self._is_over = True
        return self._is_heard

    def is_over(self, is_waiting: bool) -> bool:
        """Whether that was asked; the workers tell with it whether they wait for images."""
        self._is_heard, self._is_waiting = True, is_waiting
        return self._is_over
