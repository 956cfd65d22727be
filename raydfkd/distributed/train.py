"""Student distillation as a Ray Train job."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import ray.train.collective
import torch
from ray.train import Checkpoint, UserCallback
from ray.train.torch import TorchConfig, get_device, prepare_model
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.train.v2._internal.exceptions import CheckpointManagerInitializationError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.result import Result
from torch import Tensor, distributed

from raydfkd.checkpoints import checkpoint_bytes, read_checkpoint
from raydfkd.data.commits import Snapshot
from raydfkd.distill.training import StudentTraining
from raydfkd.distributed.board import ProgressBoard
from raydfkd.distributed.scaling import NODE_ID, ElasticTorchTrainer
from raydfkd.distributed.student_feed import announce_on
from raydfkd.distributed.turn import training_turn
from raydfkd.job import Job, job_of
from raydfkd.recipe import Recipe

logger = logging.getLogger(__name__)

__all__ = ["ProgressBoard", "new_board", "train_student"]

STATE = "state.pt"

GROW_EVERY_S = 30.0
"""A group that runs is made larger at most this often; it restarts for it."""
LOOK_EVERY_S = 2.0
"""Seconds between looks for a preemption; its notice is usually 30 s and more."""
GONE_S = 3.0
"""After a driver was seen to die, until Ray has ended its training workers too."""
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


def train_student(
    job: Job,
    board: Any,
    *,
    until: int | None = None,
    on_wait: Callable[[str], None] = logger.info,
    is_over: Callable[[], bool] = lambda: False,
) -> Mapping[str, Tensor]:
    """Run the Train job to its end, from its newest checkpoint where there is one; returns the student's state.

    Workers may come and go within ``runtime.student_workers``: the training goes on from its newest checkpoint with
    as many as there are, and a preemption that is announced makes one in time. Preemptions never make it fail.

    Of several drivers with the same student in the same run_dir one trains, and the others wait for what comes of it
    or for their turn. A driver that was killed holds nobody up.

    Args:
        job: whose student is trained.
        board: from ``new_board``; its ``end`` makes the training end early, with a checkpoint.
        until: step to stop at before the last; a later call goes on from there.
        on_wait: told who trains the student if somebody else does.
        is_over: whether to wait no longer for that.

    Raises:
        TimeoutError: it was over before the turn came.
    """
    # The same training goes on under the same name; another student or plan has another.
    name = f"student-{job.student_digest[:16]}"
    recipe = job.recipe.located()
    folder = Path(recipe.run_dir)
    steps = job.recipe.distill.steps if until is None else until
    with training_turn(folder / "train" / f"{name}.lock", on_wait, is_over) as has_waited:
        checkpoint = _newest_in(folder / name)
        state = None if checkpoint is None else _read(checkpoint)
        if state is None or state["trainer"]["step"] < steps:
            if has_waited:
                time.sleep(GONE_S)
            checkpoint = _fit(job, recipe, name, board, until, checkpoint)
            state = None if checkpoint is None else _read(checkpoint)
    student: Mapping[str, Tensor] = {} if state is None else state["student"]
    return student


def _fit(
    job: Job, recipe: Recipe, name: str, board: Any, until: int | None, checkpoint: Checkpoint | None
) -> Checkpoint | None:
    for variable, value in SETTINGS.items():
        os.environ.setdefault(variable, value)
    runtime = job.recipe.runtime
    workers = runtime.student_workers
    resources = {"CPU": runtime.cpus_per_student_worker, **runtime.resources_per_student_worker}
    if runtime.gpus_per_student_worker:
        resources["GPU"] = runtime.gpus_per_student_worker
    sealed = ray.put(recipe.model_dump_json())  # Ray Train writes the config into its logs, secrets and all
    config = {"recipe": sealed, "digest": job.digest, "board": board, "until": until, "checkpoint": checkpoint}
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
            name=name,
            storage_path=recipe.run_dir,
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=runtime.max_losses, max_preemption_failures=-1),
            callbacks=[cast(UserCallback, _Meeting(board))],  # Ray takes any callback there, and says otherwise
        ),
    )
    return cast("Checkpoint | None", trainer.fit().checkpoint) or checkpoint


class _Meeting(ControllerCallback):
    """Makes the training's controller known to its driver, who could not end it otherwise."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def after_controller_start(self, train_run_context: Any) -> None:
        self._board.meet.remote([ray.get_runtime_context().current_actor])


def train_worker(config: Mapping[str, Any]) -> None:
    """One rank of the training."""
    recipe = Recipe.model_validate_json(ray.get(config["recipe"]))
    whole, until = job_of(recipe, config["digest"]), config["until"]
    job = next((part for part in whole.rounds() if part.until == until), whole)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    board = config["board"]

    def is_over() -> bool:
        return bool(ray.get(board.is_over.remote()))

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
        on_publish=job.publisher(announce_on(board)),
        wants_checkpoint=PreemptionNotice(is_over).is_new,
        rank=rank,
        world_size=world_size,
        agree=lambda snapshot: _broadcast(snapshot, is_over),
        parallel=lambda student: prepare_model(student, move_to_device=False),
        device=get_device() if job.recipe.runtime.gpus_per_student_worker > 0 else torch.device("cpu"),
    )
    newest = ray.train.get_checkpoint() or config["checkpoint"]
    if newest is not None:
        training.load_state_dict(_read(newest))
    try:
        training.run(until=until)
    except OverError:
        if training.trainer.step:
            on_checkpoint(training.state_dict())


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
        info = ray.train.get_preemption_info()
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
    answer = answer if snapshot is None else snapshot.to_json()
    if distributed.get_world_size() > 1:
        box = [answer]
        distributed.broadcast_object_list(box, src=0)
        answer = box[0]
    if answer is True:
        raise OverError
    return Snapshot.from_json(answer) if isinstance(answer, bytes) else None


def _newest_in(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of the Train run in ``folder``.

    Ray Train writes its list of them over the old one. Where a kill has hit it there, Train would refuse to go on: the
    list goes, and the newest checkpoint that is whole is found by itself.
    """
    listed = folder / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    if not listed.exists():
        return None
    try:
        return Result.from_path(folder).checkpoint
    except (ValueError, CheckpointManagerInitializationError) as error:
        logger.warning("%s is damaged (%s); looking at the checkpoints themselves", listed, error)
    listed.unlink()
    for path in sorted(folder.glob(f"checkpoint_*/{STATE}"), reverse=True):
        checkpoint = Checkpoint.from_directory(path.parent)
        with contextlib.suppress(RuntimeError, EOFError, pickle.UnpicklingError):  # cut off by the same kill
            _read(checkpoint)
            return checkpoint
    return None


def _read(checkpoint: Checkpoint) -> dict[str, Any]:
    with checkpoint.as_directory() as folder:
        return read_checkpoint((Path(folder) / STATE).read_bytes())
