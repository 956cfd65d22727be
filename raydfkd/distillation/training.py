"""A job's student training put together, and the checkpoint that it resumes from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raydfkd.checkpoints import checkpoint_bytes, read_checkpoint
from raydfkd.data.epochs import EpochLog
from raydfkd.data.sources import SOURCES, Feed, LiveGenerator, Ranks
from raydfkd.devices import cpu_threads, keep_freed_memory, pick_device
from raydfkd.distillation.trainer import Pace, StudentTrainer, TrainingHooks, by_steps
from raydfkd.errors import differences
from raydfkd.images.pixels import PixelRange
from raydfkd.job import Job
from raydfkd.networks.layout import lay_channels_last
from raydfkd.networks.observed import ObservedNetwork
from raydfkd.networks.teacher import Teacher
from raydfkd.seeds import derive_seed
from raydfkd.store.store import Store
from raydfkd.units import Phase

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
        parallel: wraps the student for data parallelism.
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
        self._student = lay_channels_last(job.fresh_student().to(device))
        self.trainer = StudentTrainer(
            parallel(self._student),
            ObservedNetwork(teacher.module, frozen=True, precision=getattr(torch, recipe.distill.precision)).to(device),
            recipe.distill,
            pixels=PixelRange(recipe.teacher.image_space, device),
            device=device,
            seed=derive_seed(recipe.seed, "student"),
            rank=ranks.rank,
            hooks=hooks.of_student(self._student, self.state_dict, is_first=ranks.rank == 0),
        )
        self._source = SOURCES.build(
            self._spec.source.kind,
            self._spec.source.options,
            self._feed(generator, device),
            where="distill.source",
        )

    def _feed(self, generator: MakeGenerator | None, device: torch.device) -> Feed:
        job = self._job
        units = [unit for unit in self._phase.units if unit.id not in job.held_out]
        return Feed(
            transfer_set=job.transfer_set,
            units=frozenset(unit.id for unit in units),
            planned_images=sum(unit.request.count for unit in units),
            plan=self._phase.plan,
            image_bytes=math.prod(job.recipe.teacher.image_space.shape),
            steps=self._spec.steps,
            batch_size=self._spec.batch_size,
            seed=derive_seed(job.recipe.seed, "student"),
            ranks=self._ranks,
            epochs=EpochLog(_train_store(job), job.student_digest),
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
        return self._student.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Student, optimiser, schedule and position in the set."""
        return {
            "student": self._student.state_dict(),
            "trainer": self.trainer.state_dict(),
            "source": self._source.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from ``state``; after the end of a phase, with all images that there are now."""
        self._student.load_state_dict(state["student"])
        self.trainer.load_state_dict(state["trainer"])
        self._source.load_state_dict(state["source"])
        if self.trainer.step in self._phase_ends:
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
        """The newest state, or None."""
        if not self._store.exists(self._name):
            return None
        return read_checkpoint(self._store.get(self._name))


def note_training(job: Job) -> str | None:
    """Write down what the job's training depends on; says why it begins again beside another in the same folder.

    Returns None for a training that was noted before, and for the first one.
    """
    store, name = _train_store(job), f"training-{job.student_digest[:16]}.json"
    noted = [entry for entry in store.entries("") if entry.path.startswith("training-")]
    is_known = any(entry.path == name for entry in noted)
    store.put(name, json.dumps(job.trained_by, indent=1).encode())  # written again, so that the newest is the last
    if is_known or not noted:
        return None
    last = max(noted, key=lambda entry: entry.modified or 0.0)
    found = differences(json.loads(store.get(last.path)), json.loads(json.dumps(job.trained_by)))
    return "; ".join(found[:3]) + (f", and {len(found) - 3} more" if len(found) > 3 else "")


def _train_store(job: Job) -> Store:
    """The folder that the workers of a training share."""
    return Store(str(Path(job.recipe.run_dir) / "train"))
