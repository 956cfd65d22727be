"""Student distillation as a Ray Train job."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device, prepare_model
from torch import Tensor, distributed

from raydfkd.checkpoints import checkpoint_bytes, read_checkpoint
from raydfkd.data.commits import Snapshot
from raydfkd.distill.training import StudentTraining
from raydfkd.job import Job, job_of
from raydfkd.recipe import Recipe

STATE = "state.pt"


class ProgressBoard:
    """Where the training's first rank pins its learning curve for the driver to read."""

    def __init__(self) -> None:
        self._entries: list[dict[str, float]] = []

    def pin(self, entry: dict[str, float]) -> None:
        """Add an entry."""
        self._entries.append(entry)

    def take(self) -> list[dict[str, float]]:
        """Entries since the last call."""
        entries, self._entries = self._entries, []
        return entries


def train_student(job: Job, board: Any) -> Mapping[str, Tensor]:
    """Run the Train job to its end, from its newest checkpoint where there is one; returns the student's state."""
    runtime = job.recipe.runtime
    workers = runtime.student_workers
    resources = {"CPU": runtime.cpus_per_student_worker}
    if runtime.gpus_per_student_worker:
        resources["GPU"] = runtime.gpus_per_student_worker
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"recipe": job.recipe.located().model_dump_json(), "digest": job.digest, "board": board},
        scaling_config=ScalingConfig(
            num_workers=cast(int, workers.max if workers.min == workers.max else (workers.min, workers.max)),
            use_gpu=runtime.gpus_per_student_worker > 0,
            resources_per_worker=resources,
        ),
        torch_config=TorchConfig(backend="nccl" if runtime.gpus_per_student_worker > 0 else "gloo"),
        run_config=RunConfig(
            # The same training goes on under the same name; another student or plan has another.
            name=f"student-{job.student_digest[:16]}",
            storage_path=job.recipe.located().run_dir,
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=3),
        ),
    )
    checkpoint = trainer.fit().checkpoint
    if checkpoint is None:
        return {}
    student: Mapping[str, Tensor] = _read(checkpoint)["student"]
    return student


def train_worker(config: Mapping[str, Any]) -> None:
    """One rank of the training."""
    job = job_of(Recipe.model_validate_json(config["recipe"]), config["digest"])
    context = ray.train.get_context()
    rank = context.get_world_rank()
    board = config["board"]

    def on_checkpoint(state: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            if rank == 0:
                (Path(folder) / STATE).write_bytes(checkpoint_bytes(state))
            checkpoint = Checkpoint.from_directory(folder) if rank == 0 else None
            ray.train.report({"step": state["trainer"]["step"]}, checkpoint=checkpoint)

    training = StudentTraining(
        job,
        on_log=lambda entry: board.pin.remote(dict(entry)) if rank == 0 else None,
        on_checkpoint=on_checkpoint,
        rank=rank,
        world_size=context.get_world_size(),
        agree=_broadcast,
        parallel=lambda student: prepare_model(student, move_to_device=False),
        device=get_device() if job.recipe.runtime.gpus_per_student_worker > 0 else torch.device("cpu"),
    )
    newest = ray.train.get_checkpoint()
    if newest is not None:
        training.load_state_dict(_read(newest))
    training.run()


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
