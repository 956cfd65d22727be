"""Saved states of units, and the hooks between two steps of a synthesizer that make them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from typing_extensions import override

from raydfkd.checkpoints import checkpoint_bytes, read_checkpoint
from raydfkd.store.store import Store
from raydfkd.units import WorkUnit


class Interrupted(Exception):  # noqa: N818 - not an error: somebody asked for it
    """The unit was left on request; its state is saved, and whoever takes the unit next goes on from there."""


class StepHook(Protocol):
    """Called between two steps of a unit, once every image so far is with the sink."""

    def resumed(self) -> Mapping[str, Any] | None:
        """The state to go on from; None for a unit that begins."""

    def __call__(self, state: Callable[[], Mapping[str, Any]]) -> None:
        """Do what is due; ``state`` makes what ``resumed`` returns elsewhere, of tensors and plain data.

        Raises:
            Interrupted: the unit is to be left now.
        """


class NoHook(StepHook):
    """A hook in which nothing happens."""

    def resumed(self) -> None:
        """Nothing to go on from."""

    def __call__(self, state: Callable[[], Mapping[str, Any]]) -> None:
        """Nothing is due."""


NO_HOOK = NoHook()
logger = logging.getLogger(__name__)


class InnerHook(StepHook):
    """The unit's hook for a synthesizer inside another, whose state is saved beside what the outer one goes on from.

    Args:
        hook: the unit's.
        beside: makes the outer state, under keys other than ``synthesizer``.
        is_resumed: whether the saved state, if there is one, is of this synthesizer.
    """

    def __init__(self, hook: StepHook, beside: Callable[[], Mapping[str, Any]], *, is_resumed: bool = True) -> None:
        self._hook, self._beside, self._is_resumed = hook, beside, is_resumed

    @override
    def resumed(self) -> Mapping[str, Any] | None:
        saved = self._hook.resumed() if self._is_resumed else None
        return None if saved is None else saved["synthesizer"]

    @override
    def __call__(self, state: Callable[[], Mapping[str, Any]]) -> None:
        self._hook(lambda: {"synthesizer": state(), **self._beside()})


class UnitCheckpoint:
    """The newest saved state of a unit; of two attempts at once the later save counts, and both are right.

    Whoever takes the unit next goes on from there. A state is a few numbers more than the generators and their
    optimiser, or the images in work, and the rows that are too few for a part.

    Args:
        store: of the transfer set.
        unit: what the state is of.
        digest: of all that the state depends on; a state of another one is not gone on from.
    """

    def __init__(self, store: Store, unit: WorkUnit, digest: str) -> None:
        self._store = store
        self._digest = digest
        self._path = f"resume/{unit.id}.pt"

    def load(self) -> dict[str, Any] | None:
        """The state, or None where there is none that can be read."""
        try:
            state = read_checkpoint(self._store.get(self._path))
        except FileNotFoundError:
            return None
        except ValueError as error:  # a lost state costs time and nothing else
            logger.warning("%s cannot be read (%s); the unit begins anew", self._path, error)
            return None
        if state.get("digest") != self._digest:
            logger.info("%s is of another recipe, part_rows, encoding or logits; the unit begins anew", self._path)
            return None
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the state."""
        self._store.put(self._path, checkpoint_bytes({**state, "digest": self._digest}))

    def remove(self) -> None:
        """The unit is committed or has to begin anew."""
        self._store.delete(self._path)


class CheckpointHook(StepHook):
    """A hook that saves every ``every`` steps, and saves and leaves once it ``should_stop``.

    Args:
        checkpoint: where the states go.
        every: steps between two of them.
        should_stop: whether the unit is to be left; asked at every step.
        on_step: told the number of steps that were made here, before each.
        around: completes a synthesizer's state by what the rest of the attempt goes on from.
        saved: the synthesizer's state to begin with.
    """

    def __init__(
        self,
        checkpoint: UnitCheckpoint,
        *,
        every: int,
        should_stop: Callable[[], bool],
        on_step: Callable[[int], None],
        around: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        saved: Mapping[str, Any] | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._every = every
        self._should_stop = should_stop
        self._on_step = on_step
        self._around = around
        self._saved = saved
        self._steps = 0

    @override
    def resumed(self) -> Mapping[str, Any] | None:
        return self._saved

    @override
    def __call__(self, state: Callable[[], Mapping[str, Any]]) -> None:
        if self._should_stop():
            self._checkpoint.save(self._around(state()))
            raise Interrupted
        if self._steps and self._steps % self._every == 0:
            self._checkpoint.save(self._around(state()))
        self._on_step(self._steps)
        self._steps += 1
