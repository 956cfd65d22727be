"""One worker: a job and a unit in, a commit out. Knows nothing of Ray."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from raydfkd.data.commits import Commit
from raydfkd.data.sink import ParquetSink
from raydfkd.data.student_versions import StudentVersions
from raydfkd.devices import cpu_threads, keep_freed_memory
from raydfkd.errors import RecipeError
from raydfkd.job import Job, dependencies_of, transfer_set_of
from raydfkd.networks.teacher import Teacher
from raydfkd.store.errors import StoreError
from raydfkd.synthesis.build import build_student, build_synthesizer
from raydfkd.synthesis.checkpoint import CheckpointHook, Interrupted, UnitCheckpoint
from raydfkd.synthesis.synthesizer import num_steps_of
from raydfkd.units import UnitProgress, WorkUnit

logger = logging.getLogger(__name__)
TELL_EVERY_S = 1.0
"""Seconds between words on how far a unit is, where its objective is not looked at."""


def tell_nobody(progress: UnitProgress) -> None:
    """Nobody wants to know."""


class SynthesisWorker:
    """Works on one unit after another; everything expensive is built once.

    Args:
        job: whose units are worked on.
        teacher: to invert; has to be the one that the job began with.
        device: to work on.
        should_stop: whether the unit in work is to be left, its state saved; asked between any two steps.
        on_progress: told of each look at the objective, and about once a second how far the unit is.
    """

    def __init__(
        self,
        job: Job,
        teacher: Teacher,
        *,
        device: torch.device,
        should_stop: Callable[[], bool] = lambda: False,
        on_progress: Callable[[UnitProgress], None] = tell_nobody,
    ) -> None:
        recipe = job.recipe
        _refuse_other_inputs(job, dependencies_of(recipe, teacher))
        if device.type == "cpu":
            keep_freed_memory()
        self._job = job
        # rows that wait for their part are encoded already, so a state goes with the form in which they are stored
        stored = {"part_rows": recipe.transfer_set.part_rows, **recipe.transfer_set.stored_as()}
        self._digest = f"{job.digest} {json.dumps(stored, sort_keys=True)}"
        self._should_stop, self._on_progress = should_stop, on_progress
        self._students = StudentVersions(job.transfer_set.store)
        self._student = build_student(recipe, teacher.module, self._students.newest, device)
        self._synthesizer = build_synthesizer(recipe, teacher.module, device, self._student)
        self._student_versions = (
            {unit.id: phase.student_version for phase in reversed(job.phases) for unit in phase.units}
            if self._student is not None
            else {}
        )

    def run(self, unit: WorkUnit, attempt: int = 1) -> Commit:
        """Make the images of ``unit`` and commit them, from where another attempt was interrupted if one was.

        On an error of the unit itself nothing of the attempt remains. Where the store fails or the process is to end,
        the state that was saved last stays, with the parts that it names.

        Raises:
            Interrupted: ``should_stop`` said so; the unit's state is saved.
            StoreError: the set cannot be read or written.
        """
        recipe, transfer_set = self._job.recipe, self._job.transfer_set
        checkpoint = UnitCheckpoint(transfer_set.store, unit, self._digest)
        self._meet_student(unit)
        work = self._resume(unit, attempt, checkpoint.load())
        hook = CheckpointHook(
            checkpoint,
            every=recipe.runtime.checkpoint_every,
            should_stop=self._should_stop,
            on_step=lambda steps: self._on_step(work, steps),
            around=work.state_dict,
            saved=work.synthesizer_state,
        )
        try:
            with cpu_threads(recipe.synthesis.threads):
                for batch in self._synthesizer.produce(unit.request, work.log, hook):
                    work.sink.write(batch)
            commit = work.sink.commit(seconds=work.seconds)
        except (Interrupted, StoreError, KeyboardInterrupt, SystemExit):  # nothing that the unit could be blamed for
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
        """Follow the newest version of the student, the one of the phase before, or none in the first of several."""
        if self._student is None:
            return
        version = self._student_versions[unit.id]
        if version != "newest":
            self._student.follow(None if version is None else self._students.pinned(version))
        self._student.refresh()

    def _on_step(self, work: _Attempt, steps: int) -> None:
        """Called before each step, with the number of those that were made here."""
        work.step()
        is_due = steps > 0 and steps % self._job.recipe.synthesis.student_refresh == 0  # at 0 it was just met
        if self._student is not None and len(self._job.phases) == 1 and is_due:
            self._student.refresh()

    def _resume(self, unit: WorkUnit, attempt: int, state: Mapping[str, Any] | None) -> _Attempt:
        steps = num_steps_of(self._synthesizer, unit.request)
        if state is not None:
            work = _Attempt(unit, self._job.transfer_set.open(unit, attempt=attempt), steps, self._on_progress)
            try:
                work.load_state_dict(state)
            except ValueError as error:
                logger.warning("unit %s begins anew: %s", unit.id, error)
                work.sink.abandon()
            else:
                logger.info("unit %s resumes from its saved state", unit.id)
                return work
        return _Attempt(unit, self._job.transfer_set.open(unit, attempt=attempt), steps, self._on_progress)


def _refuse_other_inputs(job: Job, made_of: Mapping[str, object]) -> None:
    """Refuse weights or pictures that are not those that the job began with, as other machines may have them."""
    recipe = job.recipe
    if transfer_set_of(recipe, made_of).digest == job.digest:
        return
    if recipe.picture_folders and made_of["weights"] == job.made_of["weights"]:
        named = " or ".join(f"{key} is {folder!r}" for key, folder in recipe.picture_folders.items())
        raise RecipeError(
            f"{named}: not the pictures that this run began with; give a folder that is the same on every machine, or "
            "use another run_dir"
        )
    raise RecipeError(
        f"teacher.weights is {recipe.teacher.weights!r}: not the weights that this run began with; "
        "restore them or use another run_dir"
    )


class _Attempt:
    """What there is of a unit beside the synthesizer."""

    def __init__(
        self, unit: WorkUnit, sink: ParquetSink, steps: int, on_progress: Callable[[UnitProgress], None]
    ) -> None:
        self.sink = sink
        self.synthesizer_state: Mapping[str, Any] | None = None
        self._unit, self._num_steps = unit, steps
        self._on_progress = on_progress
        self._step = 0
        self._started = time.monotonic()
        self._told = self._started - TELL_EVERY_S

    @property
    def seconds(self) -> float:
        """Time spent on the images, that of interrupted attempts included."""
        return time.monotonic() - self._started

    def step(self) -> None:
        """A step is about to be made."""
        if time.monotonic() - self._told >= TELL_EVERY_S:
            self._tell({})
        self._step += 1

    def log(self, entry: Mapping[str, float]) -> None:
        """The objective was looked at."""
        self._tell(entry)

    def _tell(self, objective: Mapping[str, float]) -> None:
        self._told = time.monotonic()
        self._on_progress(UnitProgress(unit=self._unit.id, step=self._step, steps=self._num_steps, objective=objective))

    def state_dict(self, synthesizer: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "synthesizer": dict(synthesizer),
            "sink": self.sink.state_dict(),
            "step": self._step,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sink.load_state_dict(state["sink"])
        self.synthesizer_state = state["synthesizer"]
        self._step = state.get("step", 0)
        self._started -= state["seconds"]
