"""One worker: a recipe and a unit in, a commit out. Knows nothing of Ray."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from raydfkd.config.recipe import Recipe
from raydfkd.data.commits import Commit
from raydfkd.data.sink import ParquetSink
from raydfkd.data.student_versions import StudentVersions
from raydfkd.data.transfer_set import TransferSet
from raydfkd.devices import cpu_threads, keep_freed_memory
from raydfkd.errors import RecipeError
from raydfkd.job import digest_of
from raydfkd.networks.weights import load_teacher
from raydfkd.synthesis.build import build_student, build_synthesizer
from raydfkd.synthesis.checkpoint import CheckpointHook, Interrupted, UnitCheckpoint
from raydfkd.units import WorkUnit

logger = logging.getLogger(__name__)


class SynthesisWorker:
    """Works on one unit after another; everything expensive is built once.

    Args:
        recipe: what to make, and of which teacher.
        transfer_set: where it goes.
        device: to work on.
        should_stop: whether the unit in work is to be left, its state saved; asked between any two steps.
    """

    def __init__(
        self,
        recipe: Recipe,
        transfer_set: TransferSet,
        *,
        device: torch.device,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        if device.type == "cpu":
            keep_freed_memory()
        teacher, weights = load_teacher(recipe)
        digest = digest_of(recipe, weights)
        if digest != transfer_set.digest:
            raise RecipeError(
                f"teacher.weights is {recipe.teacher.weights!r}: not the weights that this run began with; "
                "restore them or use another run_dir"
            )
        self._threads = recipe.synthesis.threads
        self._checkpoint_every = recipe.runtime.checkpoint_every
        self._transfer_set = transfer_set
        self._should_stop = should_stop
        self._recipe = recipe
        self._students = StudentVersions(transfer_set.store)
        self._student = build_student(recipe, self._students.newest, device)
        self._synthesizer = build_synthesizer(recipe, teacher, device, self._student)

    def run(self, unit: WorkUnit, attempt: int = 1) -> Commit:
        """Make the images of ``unit`` and commit them, from where another attempt was interrupted if one was.

        On any error nothing of the attempt remains.

        Raises:
            Interrupted: ``should_stop`` said so; the unit's state is saved.
        """
        checkpoint = UnitCheckpoint(self._transfer_set.store, unit, self._transfer_set.digest)
        self._meet_student(unit)
        work = self._resume(unit, attempt, checkpoint.load())
        hook = CheckpointHook(
            checkpoint,
            every=self._checkpoint_every,
            should_stop=self._should_stop,
            on_step=self._look_for_student,
            around=work.state_dict,
            saved=work.synthesizer_state,
        )
        try:
            with cpu_threads(self._threads):
                for batch in self._synthesizer.produce(unit.request, work.log, hook):
                    work.sink.write(batch)
            commit = work.sink.commit(seconds=work.seconds, curve=work.curve)
        except Interrupted:
            work.sink.release()
            raise
        except BaseException:
            work.sink.abandon()
            checkpoint.remove()  # for it may be what led here
            raise
        checkpoint.remove()
        logger.info("unit %s committed: %d images, objective %.3f", unit.id, commit.images, commit.objective)
        return commit

    def _meet_student(self, unit: WorkUnit) -> None:
        """In rounds the student that the round before has trained, none in the first; else the newest one."""
        if self._student is None:
            return
        if self._recipe.rounds > 1:
            number = self._recipe.round_of(unit)
            version = self._recipe.steps_until(number - 1)
            self._student.follow(self._students.pinned(version) if number else None)
        self._student.refresh()

    def _look_for_student(self, steps: int) -> None:
        if (
            self._student is not None
            and self._recipe.rounds == 1
            and steps % self._recipe.synthesis.student_refresh == 0
        ):
            self._student.refresh()

    def _resume(self, unit: WorkUnit, attempt: int, state: Mapping[str, Any] | None) -> _Attempt:
        if state is not None:
            work = _Attempt(sink=self._transfer_set.open(unit, attempt=attempt))
            try:
                work.load_state_dict(state)
            except ValueError as error:
                logger.warning("unit %s begins anew: %s", unit.id, error)
                work.sink.abandon()
            else:
                logger.info("unit %s goes on from its saved state", unit.id)
                return work
        return _Attempt(sink=self._transfer_set.open(unit, attempt=attempt))


class _Attempt:
    """What there is of a unit beside the synthesizer."""

    def __init__(self, sink: ParquetSink) -> None:
        self.sink = sink
        self.curve: list[dict[str, float]] = []
        self.synthesizer_state: Mapping[str, Any] | None = None
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time spent on the images, that of interrupted attempts included."""
        return time.monotonic() - self._started

    def log(self, entry: Mapping[str, float]) -> None:
        self.curve.append(dict(entry))

    def state_dict(self, synthesizer: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "synthesizer": dict(synthesizer),
            "sink": self.sink.state_dict(),
            "curve": self.curve,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sink.load_state_dict(state["sink"])
        self.synthesizer_state = state["synthesizer"]
        self.curve = list(state["curve"])
        self._started -= state["seconds"]
