"""A job's student training put together, and the state that it can go on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raydfkd.checkpoints import checkpoint_bytes, read_checkpoint
from raydfkd.data.commits import Snapshot
from raydfkd.data.epochs import EpochLog
from raydfkd.data.sources import TransferSetSource, in_this_process
from raydfkd.devices import cpu_threads, keep_freed_memory, pick_device
from raydfkd.distill.trainer import StudentTrainer
from raydfkd.images.pixels import PixelRange
from raydfkd.job import Job
from raydfkd.networks.layout import lay_channels_last
from raydfkd.networks.observed import ObservedNetwork
from raydfkd.networks.weights import load_teacher
from raydfkd.seeds import derive_seed
from raydfkd.store.store import Store


class StudentTraining:
    """Student, teacher, trainer and source of one rank, put together as the recipe says.

    Args:
        job: whose student is trained.
        on_log: receives the learning curve, see StudentTrainer.
        on_checkpoint: receives the state to go on from.
        on_publish: receives a version of the student and its state dict: before the first step (version 0), every
            ``publish_every`` steps and after the last, the version being the number of steps. Rank 0 only. The
            tensors are the student's own; they change with the next step.
        wants_checkpoint: asked after each step whether to make a checkpoint out of turn; all ranks answer alike.
        rank: of this process.
        world_size: number of ranks.
        agree: see TransferSetSource.
        parallel: wraps the student for data parallelism.
        device: the recipe's unless given.
    """

    def __init__(  # noqa: PLR0913 - what differs between one process and several
        self,
        job: Job,
        *,
        on_log: Callable[[Mapping[str, float]], None],
        on_checkpoint: Callable[[dict[str, Any]], None],
        on_publish: Callable[[int, Mapping[str, Tensor]], None] | None = None,
        wants_checkpoint: Callable[[], bool] = lambda: False,
        rank: int = 0,
        world_size: int = 1,
        agree: Callable[[Snapshot | None], Snapshot | None] = in_this_process,
        parallel: Callable[[nn.Module], nn.Module] = lambda student: student,
        device: torch.device | None = None,
    ) -> None:
        recipe = job.recipe
        device = device or pick_device(recipe.runtime.device)
        if device.type == "cpu":
            keep_freed_memory()
        seed = derive_seed(recipe.seed, "student")
        self._spec = recipe.distill
        self._round_ends = {recipe.steps_until(number) for number in range(recipe.rounds - 1)}
        self._on_checkpoint = on_checkpoint
        self._student = lay_channels_last(job.fresh_student().to(device))
        teacher, _ = load_teacher(recipe)

        def publish(step: int) -> None:
            assert on_publish is not None
            on_publish(step, self._student.state_dict())

        self.trainer = StudentTrainer(
            parallel(self._student),
            ObservedNetwork(teacher, frozen=True, precision=getattr(torch, recipe.distill.precision)).to(device),
            recipe.distill,
            pixels=PixelRange(recipe.teacher.image_space, device),
            device=device,
            seed=seed,
            rank=rank,
            on_log=on_log,
            on_checkpoint=lambda _: self._on_checkpoint(self.state_dict()),
            on_publish=publish if on_publish is not None and rank == 0 else None,
            wants_checkpoint=wants_checkpoint,
        )
        self._source = TransferSetSource(
            job.transfer_set,
            recipe.distill.source,
            units=job.unit_ids,
            planned_images=job.planned_images,
            steps=recipe.distill.steps,
            batch_size=recipe.distill.batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            agree=agree,
            epochs=EpochLog(Store(str(Path(recipe.run_dir) / "train")), job.student_digest),
            pin_memory=device.type == "cuda",
        )

    def run(self, *, until: int | None = None) -> Mapping[str, Tensor]:
        """Train to the last step, or to step ``until`` before it; returns the student's state dict.

        Learning rates are those of the whole training: a later call, here or from the checkpoint that was made at
        ``until``, goes on as if this one had not stopped.
        """
        steps = self._spec.steps if until is None else min(until, self._spec.steps)
        with cpu_threads(self._spec.threads):
            self.trainer.fit(self._source, steps=steps)
        return self._student.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Student, optimiser, schedule and position in the set."""
        return {
            "student": self._student.state_dict(),
            "trainer": self.trainer.state_dict(),
            "source": self._source.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; after a round with all images that there are then."""
        self._student.load_state_dict(state["student"])
        self.trainer.load_state_dict(state["trainer"])
        self._source.load_state_dict(state["source"])
        if self.trainer.step in self._round_ends:
            self._source.start_over()


class StudentCheckpoint:
    """The newest state of a training, as one file; tensors and plain data only, never unpickled otherwise."""

    def __init__(self, folder: Path, digest: str) -> None:
        self._store = Store(str(folder))
        self._name = f"student-{digest[:16]}.pt"

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the newest state."""
        self._store.put(self._name, checkpoint_bytes(state))

    def load(self) -> dict[str, Any] | None:
        """The newest state, or None."""
        if not self._store.exists(self._name):
            return None
        return read_checkpoint(self._store.get(self._name))
