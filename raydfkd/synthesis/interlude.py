"""What may happen between two steps of a synthesizer: its state is saved, or the unit is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol


class Interrupted(Exception):  # noqa: N818 - not an error: somebody asked for it
    """The unit was left on request; its state is saved, and whoever takes the unit next goes on from there."""


class Interlude(Protocol):
    """Called between two steps of a unit, once every image so far is with the sink."""

    def resumed(self) -> Mapping[str, Any] | None:
        """The state to go on from; None for a unit that begins."""

    def __call__(self, state: Callable[[], Mapping[str, Any]]) -> None:
        """Do what is due; ``state`` makes what ``resumed`` returns elsewhere, of tensors and plain data.

        Raises:
            Interrupted: the unit is to be left now.
        """


class Uninterrupted:
    """An interlude in which nothing happens."""

    def resumed(self) -> None:
        """Nothing to go on from."""

    def __call__(self, state: Callable[[], Mapping[str, Any]]) -> None:
        """Nothing is due."""


UNINTERRUPTED = Uninterrupted()
