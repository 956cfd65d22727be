"""Student distillation as a Ray Train job: what its driver does."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import ray
from ray.train import Checkpoint, UserCallback
from ray.train.torch import TorchConfig
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.result import Result
from torch import Tensor

from raydfkd.config.recipe import Recipe
from raydfkd.distillation.training import forget_epochs, outdated
from raydfkd.distributed.coordinator import Coordinator
from raydfkd.distributed.ray_internals import (
    CHECKPOINT_MANAGER_SNAPSHOT_FILENAME,
    CheckpointManagerInitializationError,
    ControllerCallback,
)
from raydfkd.distributed.room import of_train_worker
from raydfkd.distributed.scaling import NODE_ID, ElasticTorchTrainer
from raydfkd.distributed.train_worker import STATE, read_state, train_worker
from raydfkd.distributed.training_lock import training_lock
from raydfkd.job import Job
from raydfkd.units import Phase

logger = logging.getLogger(__name__)
GROW_EVERY_S = 30.0
"""A group that runs is made larger at most this often; it restarts for it."""
GONE_S = 3.0
"""After a driver was seen to die, until Ray has ended its training workers too."""
SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # of the controller; 2 s are for jobs of hours, and each end waits
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # until an elastic group that finds no room is made smaller
}
"""Ray Train has these as environment variables only; what is set already stays."""


def new_coordinator() -> Any:
    """A Coordinator on this node: the driver's cannot be lost without the driver."""
    here = {NODE_ID: ray.get_runtime_context().get_node_id()}
    return ray.remote(Coordinator).options(num_cpus=0, label_selector=here).remote()


def train_student(
    job: Job,
    phase: Phase,
    coordinator: Any,
    *,
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
        phase: whose last step is the last that is made; a later phase goes on from there.
        coordinator: from ``new_coordinator``; its ``end`` makes the training end early, with a checkpoint.
        on_wait: told who trains the student if somebody else does.
        is_over: whether to wait no longer for that.

    Raises:
        TimeoutError: it was over before the turn came.
    """
    # The same training goes on under the same name; another student or plan has another.
    name = f"student-{job.student_digest[:16]}"
    recipe = job.recipe.located()
    folder = Path(recipe.run_dir)
    with training_lock(folder / "train" / f"{name}.lock", on_wait, is_over) as has_waited:
        checkpoint = _newest_in(folder / name)
        state = None if checkpoint is None else read_state(checkpoint)
        if state is not None and (why := outdated(job, state)):
            coordinator.say.remote(why)
            forget_epochs(job)
            shutil.rmtree(folder / name)  # Ray Train would go on from what it finds there
            checkpoint = state = None
        if state is None or state["trainer"]["step"] < phase.until_step:
            if has_waited:
                time.sleep(GONE_S)
            checkpoint = _fit(job, phase, recipe, name, coordinator, checkpoint)
            state = None if checkpoint is None else read_state(checkpoint)
    student: Mapping[str, Tensor] = {} if state is None else state["student"]
    return student


def _fit(
    job: Job, phase: Phase, recipe: Recipe, name: str, coordinator: Any, checkpoint: Checkpoint | None
) -> Checkpoint | None:
    for variable, value in SETTINGS.items():
        os.environ.setdefault(variable, value)
    runtime = job.recipe.runtime
    workers = runtime.student_workers
    use_gpu = runtime.gpus_per_student_worker > 0
    sealed = ray.put(recipe.model_dump_json())  # Ray Train writes the config into its logs, secrets and all
    config = {
        "recipe": sealed,
        "made_of": dict(job.made_of),
        "phase": job.phases.index(phase),
        "coordinator": coordinator,
        "checkpoint": checkpoint,
    }
    resources = of_train_worker(recipe)
    trainer = ElasticTorchTrainer(
        train_worker,
        coordinator=coordinator,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=cast(int, workers.max if workers.min == workers.max else (workers.min, workers.max)),
            use_gpu=use_gpu,
            resources_per_worker={name: share for name, share in resources.items() if share or name == "CPU"},
            elastic_resize_monitor_interval_s=GROW_EVERY_S,
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu and runtime.device != "cpu" else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=recipe.run_dir,
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=runtime.max_losses, max_preemption_failures=-1),
            callbacks=[cast(UserCallback, _Meeting(coordinator))],  # Ray takes any callback there, and says otherwise
        ),
    )
    return cast("Checkpoint | None", trainer.fit().checkpoint) or checkpoint


class _Meeting(ControllerCallback):
    """Makes the training's controller known to its driver, who could not end it otherwise."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator

    def after_controller_start(self, train_run_context: Any) -> None:
        self._coordinator.meet.remote([ray.get_runtime_context().current_actor])


def _newest_in(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of the Train run in ``folder``.

    Ray Train lists a checkpoint some time after it is there, and writes the list over the old one. Where a kill came
    before the first list, or has hit it, or the checkpoint that it names is damaged, the newest checkpoint that is
    whole is found by itself; the list goes, since Train would go on from it or refuse to.
    """
    listed = folder / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    if listed.exists():
        try:
            checkpoint = Result.from_path(folder).checkpoint
            if checkpoint is not None:
                read_state(checkpoint)
            return checkpoint
        except (ValueError, FileNotFoundError, CheckpointManagerInitializationError) as error:
            logger.warning("%s or what it names is damaged (%s); looking at the checkpoints themselves", listed, error)
            listed.unlink()
    for path in sorted(folder.glob(f"checkpoint_*/{STATE}"), reverse=True):
        checkpoint = Checkpoint.from_directory(path.parent)
        try:
            read_state(checkpoint)
        except ValueError as error:  # cut off by the same kill
            path.rename(f"{path}.damaged")
            logger.warning("%s is damaged (%s); it is now %s.damaged", path, error, path.name)
        else:
            return checkpoint
    return None
