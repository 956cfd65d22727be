"""Student distillation as a Ray Train job."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import ray.train.collective
import torch
from ray.train import Checkpoint
from ray.train.torch import TorchConfig, get_device, prepare_model
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from torch import Tensor, distributed

from raydfkd.checkpoints import checkpoint_bytes, read_checkpoint
from raydfkd.data.commits import Snapshot
from raydfkd.distill.training import StudentTraining
from raydfkd.distributed.board import ProgressBoard
from raydfkd.distributed.scaling import NODE_ID, ElasticTorchTrainer
from raydfkd.job import Job, job_of
from raydfkd.recipe import Recipe

__all__ = ["ProgressBoard", "new_board", "train_student"]

STATE = "state.pt"

GROW_EVERY_S = 30.0
"""A group that runs is made larger at most this often; it restarts for it."""
LOOK_EVERY_S = 2.0
"""Seconds between looks for a preemption; its notice is usually 30 s and more."""
SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # of the controller; 2 s are for jobs of hours, and each end waits
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # until an elastic group that finds no room is made smaller
}
"""Ray Train has these as environment variables only; what is set already stays."""


def new_board() -> Any:
    """A ProgressBoard on this node: the driver's cannot be lost without the driver."""
    here = {NODE_ID: ray.get_runtime_context().get_node_id()}
    return ray.remote(ProgressBoard).options(num_cpus=0, label_selector=here).remote()


def train_student(job: Job, board: Any, *, until: int | None = None) -> Mapping[str, Tensor]:
    """Run the Train job to its end, from its newest checkpoint where there is one; returns the student's state.

    Workers may come and go within ``runtime.student_workers``: the training goes on from its newest checkpoint with
    as many as there are, and a preemption that is announced makes one in time. Preemptions never make it fail.

    Args:
        job: whose student is trained.
        board: from ``new_board``.
        until: step to stop at before the last; a later call goes on from there.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    runtime = job.recipe.runtime
    workers = runtime.student_workers
    resources = {"CPU": runtime.cpus_per_student_worker, **runtime.resources_per_student_worker}
    if runtime.gpus_per_student_worker:
        resources["GPU"] = runtime.gpus_per_student_worker
    recipe = job.recipe.located()
    sealed = ray.put(recipe.model_dump_json())  # Ray Train writes the config into its logs, secrets and all
    config = {"recipe": sealed, "digest": job.digest, "board": board, "until": until}
    trainer = ElasticTorchTrainer(
        train_worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=cast(int, workers.max if workers.min == workers.max else (workers.min, workers.max)),
            use_gpu=runtime.gpus_per_student_worker > 0,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=GROW_EVERY_S,
        ),
        torch_config=TorchConfig(backend="nccl" if runtime.gpus_per_student_worker > 0 else "gloo"),
        run_config=RunConfig(
            # The same training goes on under the same name; another student or plan has another.
            name=f"student-{job.student_digest[:16]}",
            storage_path=recipe.run_dir,
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=runtime.max_losses, max_preemption_failures=-1),
        ),
    )
    checkpoint = trainer.fit().checkpoint
    if checkpoint is None:
        return {}
    student: Mapping[str, Tensor] = _read(checkpoint)["student"]
    return student


def train_worker(config: Mapping[str, Any]) -> None:
    """One rank of the training."""
    recipe = Recipe.model_validate_json(ray.get(config["recipe"]))
    whole, until = job_of(recipe, config["digest"]), config["until"]
    job = next((part for part in whole.rounds() if part.until == until), whole)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    board = config["board"]

    def on_log(entry: Mapping[str, float]) -> None:
        if rank == 0:
            board.pin.remote({**entry, "workers": world_size})

    def on_checkpoint(state: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            if rank == 0:
                (Path(folder) / STATE).write_bytes(checkpoint_bytes(state))
            checkpoint = Checkpoint.from_directory(folder) if rank == 0 else None
            ray.train.report({"step": state["trainer"]["step"]}, checkpoint=checkpoint)

    training = StudentTraining(
        job,
        on_log=on_log,
        on_checkpoint=on_checkpoint,
        on_publish=job.publisher(),
        wants_checkpoint=PreemptionNotice().is_new,
        rank=rank,
        world_size=world_size,
        agree=_broadcast,
        parallel=lambda student: prepare_model(student, move_to_device=False),
        device=get_device() if job.recipe.runtime.gpus_per_student_worker > 0 else torch.device("cpu"),
    )
    newest = ray.train.get_checkpoint()
    if newest is not None:
        training.load_state_dict(_read(newest))
    training.run(until=until)


class PreemptionNotice:
    """Whether one of the training's nodes is about to be taken away.

    To look is to meet the other ranks, which costs as much as a small step. So it is done about every
    ``LOOK_EVERY_S``, and rank 0 says after how many steps that is.
    """

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._interval = self._left = 1
        self._looked = time.monotonic()

    def is_new(self) -> bool:
        """Called by all ranks after each step: whether there are nodes to be taken away that were not before."""
        self._left -= 1
        if self._left:
            return False
        info = ray.train.get_preemption_info()
        now = time.monotonic()
        wanted = round(LOOK_EVERY_S * self._interval / max(now - self._looked, 1e-6))
        wanted = min(max(1, wanted), 2 * self._interval)  # steps that were fast by chance must not put it off for long
        self._interval = self._left = ray.train.collective.broadcast_from_rank_zero(wanted)
        self._looked = now
        leaving = set(info.preempted_node_ids) if info is not None else set()
        is_new = not leaving <= self._known
        self._known |= leaving
        return is_new


def _broadcast(snapshot: Snapshot | None) -> Snapshot | None:
    """Rank 0's snapshot on every rank."""
    if distributed.get_world_size() == 1:
        return snapshot
    box = [None if snapshot is None else snapshot.to_json()]
    distributed.broadcast_object_list(box, src=0)
    return None if box[0] is None else Snapshot.from_json(box[0])


def _read(checkpoint: Checkpoint) -> dict[str, Any]:
    with checkpoint.as_directory() as folder:
        return read_checkpoint((Path(folder) / STATE).read_bytes())
