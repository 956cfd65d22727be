"""Student distillation as a Ray Train job: what each of its workers does."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.collective
import torch
from ray.train import Checkpoint
from ray.train.torch import get_device, prepare_model
from torch import Tensor, distributed, nn

from raydfkd.checkpoints import checkpoint_bytes, read_checkpoint
from raydfkd.config.recipe import Recipe
from raydfkd.config.schema import RuntimeSpec
from raydfkd.data.commits import Snapshot
from raydfkd.data.sources import Ranks
from raydfkd.devices import worker_device
from raydfkd.distillation.trainer import TrainingHooks
from raydfkd.distillation.training import StudentTraining
from raydfkd.job import job_of
from raydfkd.networks.teacher import open_teacher
from raydfkd.runner.estimate import judge_of
from raydfkd.synthesis.build import generator_maker

STATE = "state.pt"
"""File of a checkpoint."""
LOOK_EVERY_S = 2.0
"""Seconds between looks for a preemption; its notice is usually 30 s and more."""


def train_worker(config: Mapping[str, Any]) -> None:
    """One rank of the training."""
    _TrainWorker(config).run()


class _TrainWorker:
    """A training and whom it tells: the coordinator, Ray Train, and the other ranks."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        recipe = Recipe.model_validate_json(ray.get(config["recipe"]))
        job = job_of(recipe, config["made_of"])
        context = ray.train.get_context()
        self._rank, self._world_size = context.get_world_rank(), context.get_world_size()
        self._coordinator = config["coordinator"]
        self._notice = PreemptionNotice(partial(self._is_over, is_waiting=False))
        teacher = open_teacher(recipe)
        self._training = StudentTraining(
            job,
            teacher,
            job.phases[config["phase"]],
            hooks=TrainingHooks(
                on_log=self._log,
                on_checkpoint=self._save,
                on_publish=job.publisher(),
                wants_checkpoint=self._notice.is_new,
            ),
            ranks=Ranks(rank=self._rank, size=self._world_size, agree=self._agree, gather=_gathered),
            generator=generator_maker(recipe, teacher.module, parallel=_data_parallel),
            judge=judge_of(recipe, teacher.module),
            parallel=_data_parallel,
            device=_device(recipe.runtime),
        )
        newest = ray.train.get_checkpoint() or config["checkpoint"]
        if newest is not None:
            self._training.load_state_dict(read_state(newest))

    def run(self) -> None:
        """Train to the end of the phase, or until the driver wants no more."""
        try:
            self._training.run()
        except OverError:
            self._save_steps()

    def _is_over(self, *, is_waiting: bool) -> bool:
        return bool(ray.get(self._coordinator.is_over.remote(is_waiting)))

    def _log(self, entry: Mapping[str, float]) -> None:
        if self._rank == 0:
            self._coordinator.pin.remote({**entry, "workers": self._world_size})

    def _save_steps(self) -> None:
        if self._training.trainer.step:
            self._save(self._training.state_dict())

    def _save(self, state: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            if self._rank == 0:
                (Path(folder) / STATE).write_bytes(checkpoint_bytes(state))
            checkpoint = Checkpoint.from_directory(folder) if self._rank == 0 else None
            ray.train.report({"step": state["trainer"]["step"]}, checkpoint=checkpoint)

    def _agree(self, snapshot: Snapshot | None) -> Snapshot | None:
        agreed = _broadcast(snapshot, partial(self._is_over, is_waiting=True))
        if agreed is None and self._notice.look():  # between two steps, the second of which may be long in coming
            self._save_steps()
        return agreed


def _device(runtime: RuntimeSpec) -> torch.device:
    """The worker's own device; of the GPUs that the workers of a machine share, the one that Ray Train gave it."""
    device = worker_device(runtime.device, runtime.gpus_per_student_worker)
    return get_device() if device.type == "cuda" and runtime.gpus_per_student_worker else device


def _data_parallel(module: nn.Module) -> nn.Module:
    return prepare_model(module, move_to_device=False)


class OverError(Exception):
    """The driver wants the training to end now; raised between steps, on all ranks at the same one."""


class PreemptionNotice:
    """Whether one of the training's nodes is about to be taken away, or the driver wants it to end.

    To look is to meet the other ranks, which costs as much as a small step. So it is done about every
    ``LOOK_EVERY_S``, and rank 0 says after how many steps that is.

    Args:
        is_over: whether the driver wants the training to end; asked on rank 0.
    """

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self._is_over = is_over
        self._known: set[str] = set()
        self._interval = self._left = 1
        self._looked = time.monotonic()

    def is_new(self) -> bool:
        """Called by all ranks after each step: whether there are nodes to be taken away that were not before.

        Raises:
            OverError: the driver wants the training to end.
        """
        self._left -= 1
        if self._left:
            return False
        is_new = self.look()
        now = time.monotonic()
        wanted = round(LOOK_EVERY_S * self._interval / max(now - self._looked, 1e-6))
        wanted = min(max(1, wanted), 2 * self._interval)  # steps that were fast by chance must not put it off for long
        is_first = ray.train.get_context().get_world_rank() == 0
        answer = (wanted, is_first and self._is_over())
        (self._interval, is_over) = ray.train.collective.broadcast_from_rank_zero(answer)
        self._left = self._interval
        if is_over:
            raise OverError
        self._looked = now
        return is_new

    def look(self) -> bool:
        """Called by all ranks at once: whether there are nodes to be taken away that were not before."""
        info = ray.train.get_preemption_info()
        leaving = set(info.preempted_node_ids) if info is not None else set()
        is_new = not leaving <= self._known
        self._known |= leaving
        return is_new


def _broadcast(snapshot: Snapshot | None, is_over: Callable[[], bool]) -> Snapshot | None:
    """Rank 0's snapshot on every rank; where it has none, which may be for long, the training may be over.

    Raises:
        OverError: it is.
    """
    answer: bytes | bool = is_over() if snapshot is None and distributed.get_rank() == 0 else False
    answer = answer if snapshot is None else snapshot.packed
    if distributed.get_world_size() > 1:
        box = [answer]
        distributed.broadcast_object_list(box, src=0)
        answer = box[0]
    if answer is True:
        raise OverError
    if snapshot is not None:
        return snapshot
    return Snapshot.unpacked(answer) if isinstance(answer, bytes) else None


def _gathered(rows: Tensor) -> Tensor:
    """The rows of all ranks, in the order of the ranks; those of a rank may be more than those of another."""
    if distributed.get_world_size() == 1:
        return rows
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, rows)
    return torch.cat(found)


def read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a training saved, whole: its ``state_dict``."""
    with checkpoint.as_directory() as folder:
        return read_checkpoint((Path(folder) / STATE).read_bytes())
