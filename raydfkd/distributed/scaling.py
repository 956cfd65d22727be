"""How many training workers there are, while nodes come and go."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import ray
from ray.train.constants import TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError
from ray.train.v2.torch.torch_trainer import TorchTrainer
from typing_extensions import override

from raydfkd.distributed.machines import takes_connections
from raydfkd.distributed.ray_internals import (
    DefaultFailurePolicy,
    ElasticScalingPolicy,
    FailureDecision,
    NoopDecision,
    ReschedulingState,
    ResizeDecision,
    WorkerGroupPollStatus,
    WorkerGroupStartupTimeoutError,
    WorkerGroupState,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
    draining_nodes,
    free_resources,
)
from raydfkd.errors import one_line

Resources = dict[str, float]
GETS_ON_S = 600.0
"""A training that has run for so long since it last failed does not fail for the same reason."""
NODE_ID = "ray.io/node-id"
"""Label that every node has."""
LOST = (WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError)
"""What stands for a Train worker that went away, rather than for an error that its code raised."""
LEAVE_S = 3
"""Seconds for ranks to leave their process group; where one of them is lost, the others never can."""


class ElasticTorchTrainer(TorchTrainer):
    """A trainer whose elastic group is as large as the nodes that are there now allow, and that outlives many losses.

    ``LiveNodesPolicy`` sizes the group and ``FailuresInARow`` decides when it is enough.

    Args:
        coordinator: told what people should know; the workers tell it how far they are.
    """

    def __init__(self, *args: Any, coordinator: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._coordinator = coordinator

    @override
    def fit(self) -> Any:
        """Train to the end.

        Raises:
            Exception: what the workers' own code raised, if that ended the training.
            TrainingFailedError: whatever else did.
        """
        try:
            return super().fit()
        except WorkerGroupError as error:
            own = _own_error(error)
            if own is None:
                raise
            raise own from error

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        config = cast(ScalingConfig, self.scaling_config)
        failures = cast(RunConfig, self.run_config).failure_config
        assert failures is not None, "RunConfig fills it in"
        parts["failure_policy"] = FailuresInARow(failures, self._coordinator)
        if config.elasticity_enabled:
            parts["scaling_policy"] = LiveNodesPolicy(config)
        return super()._initialize_and_run_controller(**parts)


class FailuresInARow(DefaultFailurePolicy):
    """Gives a training up after ``max_failures`` failures in a row, rather than in all.

    A machine that is killed without notice is a failure to Ray. In days on spot machines there are many, but between
    them training gets on; a mistake comes back before it does. An error of the workers' own code that comes back at the
    same step is a mistake beyond doubt, and ends the training at once. The store's errors are not: it may be back.

    Args:
        failure_config: how many failures there may be.
        coordinator: tells how far the workers are, and is told of each failure.
    """

    def __init__(self, failure_config: FailureConfig, coordinator: Any) -> None:
        super().__init__(failure_config)
        self._coordinator = coordinator
        self._failed = float("-inf")
        self._last: tuple[str, int] | None = None

    @override
    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        now = time.monotonic()
        if now - self._failed > GETS_ON_S:
            self._worker_group_failures = 0
        self._failed = now
        before, self._last = self._last, None
        decision = super().make_decision(training_failed_error)
        if decision == FailureDecision.RETRY and isinstance(training_failed_error, WorkerGroupError):
            own = _own_error(training_failed_error)
            step = ray.get(self._coordinator.last_step.remote())
            if own is not None:
                self._last = (f"{type(own).__name__}: {one_line(own)}", step)
                if self._last == before and not isinstance(own, OSError):
                    return FailureDecision.RAISE
            said = "a worker was lost" if self._last is None else f"a worker failed: {self._last[0]}"
            self._coordinator.say.remote(
                f"{said} (after step {step:,}); trying again from the newest checkpoint, "
                f"{self._worker_group_failures} of {self.failure_config.max_failures} times"
            )
        return decision


def _own_error(error: WorkerGroupError) -> Exception | None:
    """What the code of the lowest rank that failed raised; None where a worker was lost, which makes others fail."""
    failures = [error.worker_failures[rank] for rank in sorted(error.worker_failures)]
    if not failures or any(isinstance(failure, LOST) for failure in failures):
        return None
    return failures[0] if isinstance(failures[0], Exception) else None


class LiveNodesPolicy(ElasticScalingPolicy):
    """Sizes a training by the nodes that answer and are not about to go, asked at the moment of the decision.

    Ray's own policy asks a coordinator that looks at the cluster every 20 s, counts draining nodes, and believes in a
    killed node until its health checks have failed, 15 s and more. After a loss it waits for workers that nobody can
    start until a timeout of a minute, and again if that was too early.

    A group that is lost starts again at once with as many workers as fit, on nodes that answered; one less after each
    start that found no room. A group that runs grows where there is free room beside it, when a checkpoint was just
    registered, so that hardly a step is made twice. Free room is not looked at for a lost group, whose own resources
    would be missing from it; where other actors want what the workers want, give the workers a custom resource.
    """

    def __init__(self, scaling_config: ScalingConfig) -> None:
        super().__init__(scaling_config)
        self._tried = self._at_most = scaling_config.max_workers
        self._nodes: tuple[str, ...] = ()

    @override
    def after_controller_start(self, train_run_context: Any) -> None:
        # Ray reads it where it shuts the group down, which is here, and only from the environment.
        os.environ.setdefault(TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S, str(LEAVE_S))
        super().after_controller_start(train_run_context)

    @override
    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> NoopDecision | ResizeDecision:
        self._maybe_send_resource_request()  # type: ignore[no-untyped-call]  # as is much of Ray
        self._at_most = self.scaling_config.max_workers
        reports = [status.training_report for status in worker_group_status.worker_statuses.values()]
        is_saved = any(report is not None and report.checkpoint is not None for report in reports)
        has_run_s = time.monotonic() - worker_group_state.start_time
        is_due = has_run_s >= self.scaling_config.elastic_resize_monitor_interval_s
        running = worker_group_state.num_workers
        if not (is_saved and is_due) or running == self._at_most:
            return NoopDecision()
        free = free_resources()
        room = self._count_possible_workers({node: dict(free.get(node, {})) for node in self._get_reserved_resources()})
        workers = min(self._at_most, running + room)
        return self._get_resize_decision(workers) if workers > running else NoopDecision()

    @override
    def on_controller_start_worker_group(self, *, scaling_config: ScalingConfig, num_workers: int) -> dict[str, str]:
        # Nodes that are gone may still be listed.
        return {NODE_ID: f"in({','.join(self._nodes)})"}

    @override
    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        # A start that found no room is followed by one with a worker less.
        if isinstance(current_state, ReschedulingState):
            error = current_state.training_failed_error
            if isinstance(error, ControllerError) and isinstance(
                error.controller_failure, WorkerGroupStartupTimeoutError
            ):
                self._at_most = max(self.scaling_config.min_workers, self._tried - 1)

    def _get_reserved_resources(self) -> dict[str, Resources]:
        """All resources of the nodes that a worker can start on."""
        leaving = draining_nodes()
        wanted = self.scaling_config._resources_per_worker_not_none
        nodes = [
            node
            for node in ray.nodes()  # type: ignore[no-untyped-call]
            if node["Alive"]
            and node["NodeID"] not in leaving
            and all(node["Resources"].get(resource, 0) >= share for resource, share in wanted.items())
        ]
        with ThreadPoolExecutor(32) as threads:
            answers = list(threads.map(takes_connections, nodes))
        found = {node["NodeID"]: node["Resources"] for node, is_there in zip(nodes, answers, strict=True) if is_there}
        self._nodes = tuple(found)
        return found

    def _count_possible_workers(self, reserved_resources: dict[str, Resources]) -> int:
        return min(self._at_most, super()._count_possible_workers(reserved_resources))

    def _get_resize_decision(self, num_workers: int) -> ResizeDecision:
        self._tried = num_workers
        return super()._get_resize_decision(num_workers)
