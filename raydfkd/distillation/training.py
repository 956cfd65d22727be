"""A job's student training put together, and the checkpoint that it resumes from."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raydfkd.checkpoints import checkpoint_bytes, read_checkpoint
from raydfkd.data.epochs import EpochLog
from raydfkd.data.sources import SOURCES, Feed, LiveGenerator, Ranks
from raydfkd.devices import cpu_threads, dtype_of, keep_freed_memory, pick_device
from raydfkd.distillation.loss import StudentLoss
from raydfkd.distillation.selection import JudgeStudent, StudentSelection
from raydfkd.distillation.trainer import Pace, StudentTrainer, TrainingHooks, by_steps
from raydfkd.errors import differences
from raydfkd.images.pixels import PixelRange
from raydfkd.job import Job
from raydfkd.networks.layout import lay_channels_last
from raydfkd.networks.observed import ObservedNetwork
from raydfkd.networks.student import fresh_student
from raydfkd.networks.teacher import Teacher
from raydfkd.seeds import derive_seed
from raydfkd.store.store import Store
from raydfkd.units import Phase

logger = logging.getLogger(__name__)
_NOTE = re.compile(r"training-[0-9a-f]+\.json")
MakeGenerator = Callable[[nn.Module, int, Ranks, torch.device], LiveGenerator]
"""Makes the generator of a live source against a student in training, to be trained for a number of steps."""


class StudentTraining:
    """Student, teacher, trainer and source of one rank, put together as the recipe says.

    Args:
        job: the job whose student is trained.
        teacher: the job's teacher.
        phase: the phase whose images the student is trained on.
        hooks: functions that are told of the training.
        ranks: the processes that train.
        generator: makes the generator of a live source.
        judge: of the students among which the best is the result; the last is, unless given.
        parallel: wraps the student, and what is trained along with it, for data parallelism.
        device: the recipe's unless given.
    """

    def __init__(
        self,
        job: Job,
        teacher: Teacher,
        phase: Phase,
        *,
        hooks: TrainingHooks,
        ranks: Ranks | None = None,
        generator: MakeGenerator | None = None,
        judge: JudgeStudent | None = None,
        parallel: Callable[[nn.Module], nn.Module] = lambda student: student,
        device: torch.device | None = None,
    ) -> None:
        recipe, ranks = job.recipe, ranks or Ranks()
        device = device or pick_device(recipe.runtime.device)
        if device.type == "cpu":
            keep_freed_memory()
        self._job, self._spec, self._ranks = job, recipe.distill, ranks
        self._phase = phase
        self._phase_ends = {phase.until_step for phase in job.phases[:-1]}
        self._student = lay_channels_last(fresh_student(recipe, teacher.module).to(device))
        self._selection = None if judge is None or ranks.rank else StudentSelection(judge)
        step_hooks = hooks.of_student(lambda: self.trainer.student, self.state_dict, is_first=ranks.rank == 0)
        self._publish = step_hooks.on_publish
        self.trainer = StudentTrainer(
            self._student,
            ObservedNetwork(
                teacher.module,
                taps=StudentLoss(recipe.distill).teacher_taps,
                frozen=True,
                precision=dtype_of(recipe.distill.precision, device),
            ).to(device),
            recipe.distill,
            pixels=PixelRange(recipe.teacher.image_space, device, made=recipe.made_space),
            device=device,
            seed=derive_seed(recipe.seed, "student"),
            rank=ranks.rank,
            hooks=replace(step_hooks, on_publish=self._select),
            parallel=parallel,
        )
        self._source = SOURCES.build(
            self._spec.source.kind,
            self._spec.source.options,
            self._feed(generator, device),
            where="distill.source",
        )

    def _select(self, step: int) -> None:
        """Look at a version of the second half of the schedule before it is published, and end with the best."""
        if self._selection is not None:
            if 2 * self.trainer.place >= self._spec.steps:
                self._selection.look(self.trainer.student)
            if self.trainer.place >= self._spec.steps:
                self._selection.restore(self.trainer.student)
        self._publish(step)

    def _feed(self, generator: MakeGenerator | None, device: torch.device) -> Feed:
        job = self._job
        units = job.trained_units(self._phase)
        return Feed(
            transfer_set=job.transfer_set,
            units=frozenset(unit.id for unit in units),
            planned_images=sum(unit.request.count for unit in units),
            plan=self._phase.plan,
            image_bytes=math.prod(job.recipe.made_space.shape),
            num_classes=job.recipe.teacher.classes,
            augment=self._spec.augment,
            ask=self.trainer.ask_about_views,
            steps=self._spec.steps,
            batch_size=self._spec.batch_size,
            seed=derive_seed(job.recipe.seed, "student"),
            ranks=self._ranks,
            epochs=_epochs_of(job),
            pin_memory=device.type == "cuda",
            generator=None if generator is None else lambda steps: generator(self._student, steps, self._ranks, device),
        )

    def run(self, *, pace: Pace = by_steps) -> Mapping[str, Tensor]:
        """Train to the end of the phase; returns the student's state dict.

        Learning rates are those of the whole training: the training of the next phase, here or from the checkpoint
        that was made at the end of this one, continues as if this one had not stopped. With another ``pace`` the last
        step is a place in the schedule, and there are as many steps as it makes of them.
        """
        with cpu_threads(self._spec.threads):
            self.trainer.fit(self._source, steps=self._phase.until_step, pace=pace)
            self._source.finish()
        return self.trainer.student.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Student, optimiser, schedule and position in the set."""
        return {
            "student": self.trainer.student.state_dict(),
            "trainer": self.trainer.state_dict(),
            "source": self._source.state_dict(),
            **({} if self._selection is None else {"selection": self._selection.state_dict()}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from ``state``; after the end of a phase, with all images that there are now."""
        self.trainer.student.load_state_dict(state["student"])
        self.trainer.load_state_dict(state["trainer"])
        self._source.load_state_dict(state["source"])
        if self._selection is not None:
            self._selection.load_state_dict(state.get("selection", {}))
        if self.trainer.place in self._phase_ends:
            self._source.start_over()


class StudentCheckpoint:
    """The newest state of a training, as one file; tensors and plain data only, never unpickled otherwise."""

    def __init__(self, job: Job) -> None:
        self._store = _train_store(job)
        self._name = f"student-{job.student_digest[:16]}.pt"

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the newest state."""
        self._store.put(self._name, checkpoint_bytes(state))

    def load(self) -> dict[str, Any] | None:
        """The newest state, or None where there is none; one that is damaged is set aside with a warning."""
        try:
            content = self._store.get(self._name)
        except FileNotFoundError:
            return None
        try:
            return read_student(content)
        except ValueError as error:
            _set_aside(self._store, self._name, content, error)
            logger.warning("the student is trained from the beginning")
            return None

    def remove(self) -> None:
        """The training begins anew."""
        self._store.delete(self._name)


def read_student(content: bytes) -> dict[str, Any]:
    """The ``state_dict`` of a training in a checkpoint's bytes.

    Raises:
        ValueError: the content is damaged, or of something else.
    """
    state = read_checkpoint(content)
    missing = {"student", "trainer", "source"} - state.keys()
    if missing:
        raise ValueError(f"a checkpoint without {', '.join(sorted(missing))}")
    return state


def outdated(job: Job, state: Mapping[str, Any]) -> str | None:
    """Why a training whose last ``state`` this is has to begin anew; None where it need not.

    It has if it had come to an end, of a phase or of all, on fewer images than the recipe wants there, because
    synthesis had ended without the others, and there are more images by now, or they are being made.
    """
    step, images = state["trainer"]["step"], state["trainer"].get("snapshot_images", 0)
    phase = next((phase for phase in job.phases if phase.until_step == step), None)
    if phase is None or images >= state["trainer"].get("wanted_images", 0):
        return None
    units = job.trained_units(phase)
    planned = sum(unit.request.count for unit in units)
    there = job.transfer_set.snapshot(within={unit.id for unit in units}).images
    if there > images:
        return f"trains from the beginning: it has seen {images:,} of {planned:,} images, and now there are {there:,}"
    if not job.transfer_set.is_closed(phase.plan):
        return f"trains from the beginning: it has seen {images:,} of {planned:,} images; the others are being made"
    return None


def forget_epochs(job: Job) -> None:
    """Let a training that begins anew choose the snapshots of its epochs anew."""
    _epochs_of(job).forget()


def note_training(job: Job) -> str | None:
    """Write down what the job's training depends on; says why it begins again beside another in the same folder.

    Returns None for a training that was noted before, and for the first one.
    """
    store, name = _train_store(job), f"training-{job.student_digest[:16]}.json"
    noted = [entry for entry in store.entries("") if _NOTE.fullmatch(entry.path)]
    is_known = any(entry.path == name for entry in noted)
    store.put(name, json.dumps(job.trained_by, indent=1).encode())  # written again, so that the newest is the last
    if is_known or not noted:
        return None
    last = max(noted, key=lambda entry: entry.modified or 0.0)
    content = store.get(last.path)
    try:
        there = json.loads(content)
    except ValueError as error:
        _set_aside(store, last.path, content, error)
        return f"{last.path}, which would tell what differs, was damaged"
    found = differences(there, json.loads(json.dumps(job.trained_by)))
    return "; ".join(found[:3]) + (f", and {len(found) - 3} more" if len(found) > 3 else "")


def _set_aside(store: Store, name: str, content: bytes, error: ValueError) -> None:
    """Take a damaged file out of the way, so that it is met once, and keep it for who wants to look at it."""
    store.put(f"{name}.damaged", content)
    store.delete(name)
    logger.warning("%s/%s is damaged (%s); it is now %s.damaged", store.uri, name, error, name)


def _epochs_of(job: Job) -> EpochLog:
    return EpochLog(_train_store(job), job.student_digest)


def _train_store(job: Job) -> Store:
    """The folder that the workers of a training share."""
    return Store(str(Path(job.recipe.run_dir) / "train"))
