"""Synthesis on an elastic pool of actors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from raydfkd.data.commits import Commit
from raydfkd.job import Job, transfer_set_of
from raydfkd.progress import Monitor
from raydfkd.recipe import Recipe
from raydfkd.schedule import UnitQueue, WorkUnit
from raydfkd.synthesis.worker import SynthesisWorker, pick_device

logger = logging.getLogger(__name__)

POLL_S = 0.5
LOST = (RayActorError, NodeDiedError, OutOfMemoryError, WorkerCrashedError)
"""What Ray raises when a machine or process went away under a call: not a failure, but see UnitQueue.lost."""


class SynthesisActor:
    """A worker in a process of its own; builds everything at the first call, so that a mistake reaches the driver."""

    def __init__(self, recipe: str, digest: str) -> None:
        self._recipe = Recipe.model_validate_json(recipe)
        self._digest = digest
        self._worker: SynthesisWorker | None = None

    def ready(self) -> None:
        """Build the worker: teacher, objective, synthesizer."""
        if self._worker is None:
            device = pick_device(self._recipe.runtime.device)
            transfer_set = transfer_set_of(self._recipe, self._digest)
            self._worker = SynthesisWorker(self._recipe, transfer_set, device=device)

    def run(self, unit: WorkUnit, attempt: int) -> bytes:
        """Commit ``unit``; only the commit's record travels, never pixels."""
        self.ready()
        assert self._worker is not None
        return self._worker.run(unit, attempt).to_json()


class SynthesisPool:
    """Keeps up to ``runtime.workers.max`` actors busy with the units of a queue.

    All actors are requested at once: those that find no room stay pending, which is what an autoscaler sees as
    demand, and join when a node does. A restarted actor is used again under its old handle.
    """

    def __init__(self, job: Job, monitor: Monitor) -> None:
        self._job = job
        self._monitor = monitor
        self._actors: list[Any] = []
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._busy: dict[Any, tuple[Any, WorkUnit]] = {}

    def run(self, queue: UnitQueue, on_tick: Callable[[], None]) -> None:
        """Work until the queue is drained; ``on_tick`` is called twice a second or more often."""
        if queue.is_drained:
            return
        warn_of_workers_without_room(self._job.recipe, self._monitor)
        self._monitor.synthesis_started()
        try:
            for _ in range(min(self._job.recipe.runtime.workers.max, len(self._job.units) - queue.num_done)):
                self._await_ready(self._new_actor())
            while not queue.is_drained:
                finished, _ = ray.wait([*self._starting, *self._busy], num_returns=1, timeout=POLL_S)
                for reference in finished:
                    if reference in self._starting:
                        self._started(reference, queue)
                    else:
                        self._worked(reference, queue)
                # A unit that failed or was lost elsewhere may have come back.
                for actor in [self._idle.pop() for _ in range(len(self._idle))]:
                    self._give_work(actor, queue)
                on_tick()
        finally:
            self._dismiss()

    def _new_actor(self) -> Any:
        runtime = self._job.recipe.runtime
        actor = (
            ray.remote(SynthesisActor)
            .options(
                num_cpus=runtime.cpus_per_worker,
                num_gpus=runtime.gpus_per_worker,
                max_restarts=-1,
                max_task_retries=0,
            )
            .remote(self._job.recipe.located().model_dump_json(), self._job.digest)
        )
        self._actors.append(actor)
        return actor

    def _await_ready(self, actor: Any) -> None:
        self._starting[actor.ready.remote()] = actor

    def _started(self, reference: Any, queue: UnitQueue) -> None:
        actor = self._starting.pop(reference)
        try:
            ray.get(reference)
        except LOST as error:
            self._replace(actor, error)
        except RayTaskError as error:
            raise _cause(error) from None
        else:
            self._give_work(actor, queue)

    def _worked(self, reference: Any, queue: UnitQueue) -> None:
        actor, unit = self._busy.pop(reference)
        try:
            commit = Commit.from_json(ray.get(reference))
        except LOST as error:
            failure = queue.lost(unit, preempted=isinstance(error, RayActorError) and error.preempted)
            if failure is None:
                self._monitor.lost(unit.id, type(error).__name__)
            else:
                self._monitor.failed(failure, is_final=True)
            self._replace(actor, error)
            return
        except RayTaskError as error:
            cause = _cause(error)
            logger.debug("unit %s failed", unit.id, exc_info=error)
            failure = queue.failed(unit, f"{type(cause).__name__}: {cause}")
            self._monitor.failed(failure, is_final=queue.is_quarantined(unit))
        else:
            queue.finished(unit)
            self._monitor.committed(commit, running=queue.num_running)
        self._give_work(actor, queue)

    def _give_work(self, actor: Any, queue: UnitQueue) -> None:
        unit = queue.take()
        if unit is not None:
            self._busy[actor.run.remote(unit, queue.attempt_of(unit))] = (actor, unit)
        else:
            self._idle.append(actor)

    def _replace(self, actor: Any, error: Exception) -> None:
        if isinstance(error, ActorDiedError):
            self._actors.remove(actor)
            actor = self._new_actor()
        self._await_ready(actor)

    def _dismiss(self) -> None:
        for actor in self._actors:
            ray.kill(actor)


def _cause(error: RayTaskError) -> Exception:
    cause = error.cause
    return cause if isinstance(cause, Exception) else error


def warn_of_workers_without_room(recipe: Recipe, monitor: Monitor) -> None:
    """Say so where Ray could not hold as many workers as are asked for; pending ones are demand to an autoscaler."""
    runtime, has = recipe.runtime, capacity()
    wanted = {"CPU": runtime.cpus_per_worker, "GPU": runtime.gpus_per_worker}
    room = min((int(has[resource] / share) for resource, share in wanted.items() if share), default=runtime.workers.max)
    if room < runtime.workers.max:
        monitor.say(
            "workers",
            f"runtime.workers.max is {runtime.workers.max}, but Ray has {has['CPU']:g} CPUs and {has['GPU']:g} GPUs, "
            f"room for {room}; the others wait for nodes to join",
        )


def capacity() -> dict[str, float]:
    """CPUs and GPUs of the cluster that this process is connected to."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray has no stub for it
    return {resource: resources.get(resource, 0.0) for resource in ("CPU", "GPU")}
