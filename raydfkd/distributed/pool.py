"""Synthesis on an elastic pool of actors."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from raydfkd.data.commits import Commit
from raydfkd.distributed.actor import Place, SynthesisActor, Work
from raydfkd.distributed.lookout import Lookout
from raydfkd.distributed.machines import is_there
from raydfkd.distributed.patience import Patience
from raydfkd.distributed.ray_internals import node_of
from raydfkd.errors import RecipeError, last_line
from raydfkd.job import Job
from raydfkd.runner.events import Events
from raydfkd.runner.setbacks import Setbacks
from raydfkd.runner.signals import Interruption
from raydfkd.store.errors import OutageError
from raydfkd.units import UnitProgress, UnitQueue, WorkUnit

logger = logging.getLogger(__name__)
ACTOR: Any = ray.remote(concurrency_groups={"control": 1})(SynthesisActor)  # type: ignore[call-overload]  # no stub
POLL_S = 0.5
PROGRESS_S = 2.0
"""Seconds between questions to busy workers how far their units are."""
FINISH_S = 6.0
"""How long units in work may still finish once the run is interrupted; after that they are left, their state saved."""
LEAVE_S = 10.0
"""When workers are ended that have neither finished nor left by then."""
MAX_STILLBORN = 5
"""Workers in a row that die while they are built, on machines that are there, after which it is not the machines."""
FIRST_PAUSE_S, MOST_PAUSE_S = 0.5, 60.0
"""Pause before another worker is built after one that could not be, doubled with each that follows, and the longest."""
MAX_FAILURES = 2
"""Units in a row that fail on a worker before another takes its place: an error on a device often stays with a
process."""
LOST = (RayActorError, NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError)
"""What Ray raises when a machine or process went away under a call: not a failure, but see UnitQueue.lost."""


@dataclass(slots=True, eq=False)
class _Worker:
    """An actor, and what is known of it."""

    actor: Any
    node: str = ""
    """Id of its node; "" until it is ready."""
    unit: WorkUnit | None = None
    """The unit that it works on."""
    question: Any = None
    """How far it is, as long as it was asked and has not answered."""
    heard: float = field(default_factory=time.monotonic)
    """When its unit began or last got on."""
    step: int = 0
    """Steps of its unit that it has told of."""
    is_silent: bool = False
    """Whether its unit has not got on for so long that another worker was to make it."""
    num_failures: int = 0
    """Units in a row that failed on it."""


class SynthesisPool:
    """Keeps up to ``runtime.workers.max`` actors busy with the units of a queue.

    As many actors are requested as there are units for, up to that number: those that find no room stay pending, which
    is what an autoscaler sees as demand, and join when a node does. One that dies is replaced. When the queue drains,
    actors without a unit are ended, down to ``runtime.workers.min``, so that their machines can go.

    Machines may vanish without notice, any number of them: as long as one worker works or another can be built the run
    goes on. A worker whose unit does not get on loses it to another; whoever commits it first counts.

    Args:
        job: whose units are worked on.
        events: told of commits, losses and failures.
    """

    def __init__(self, job: Job, events: Events) -> None:
        self._job = job
        self._events = events
        self._bounds = job.recipe.runtime.workers
        self._idle: list[_Worker] = []
        self._unreachable: list[_Worker] = []
        self._calls: dict[Any, _Worker] = {}
        self._gone: dict[str, bool] = {}
        self._num_stillborn = 0
        self._pause_s = self._next_birth = 0.0
        self._patience = Patience()
        self._lookout = Lookout(job)
        self._setbacks = Setbacks(events)
        self._next_question = time.monotonic()

    def run(self, queue: UnitQueue, on_tick: Callable[[], None], interruption: Interruption) -> None:
        """Work until the queue is drained; ``on_tick`` is called twice a second or more often.

        Raises:
            RecipeError: workers cannot be built.
            RunError: units fail for a reason that they have in common.
            OutageError: the store was out of reach for too long.
            KeyboardInterrupt: there was an ``interruption``; what was in work is committed or its state saved.
        """
        if queue.is_drained:
            return
        self._events.synthesis_started()
        try:
            while not queue.is_drained and not interruption.is_requested:
                self._resize(queue)
                self._look(queue, POLL_S)
                # A unit that failed or was lost elsewhere may have come back.
                for worker in [self._idle.pop() for _ in range(len(self._idle))]:
                    self._give_work(worker, queue)
                self._look_at_set(queue)
                self._ask_for_progress(queue)
                self._watch(queue)
                on_tick()
            if interruption.is_requested:
                on_tick()  # who trains beside it need not wait until it is wound up
                self._wind_up(queue, interruption)
                raise KeyboardInterrupt
        finally:
            for worker in self._workers():
                ray.kill(worker.actor)

    @property
    def is_at_work(self) -> bool:
        """Whether a worker is ready, and so has what room it wants."""
        return any(worker.node and not worker.is_silent for worker in self._workers())

    def _workers(self) -> Iterator[_Worker]:
        yield from self._idle
        yield from self._unreachable
        yield from self._calls.values()

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._calls.values() if worker.unit is not None]

    # How many there are

    def _resize(self, queue: UnitQueue) -> None:
        """As many actors as there are units to work on, within bounds."""
        while self._unreachable:
            self._await_ready(self._unreachable.pop())
        num_workers = sum(not worker.is_silent for worker in self._workers())
        if time.monotonic() >= self._next_birth:
            for _ in range(min(self._bounds.max, queue.num_open) - num_workers):
                self._await_ready(_Worker(self._new_actor()))
        for _ in range(num_workers - max(self._bounds.min, queue.num_open)):
            starting = [call for call, worker in self._calls.items() if worker.unit is None]
            if not starting and not self._idle:
                break
            worker = self._calls.pop(starting[-1]) if starting else self._idle.pop()
            ray.kill(worker.actor)

    def _new_actor(self) -> Any:
        runtime = self._job.recipe.runtime
        options = {
            "num_cpus": runtime.cpus_per_worker,
            "num_gpus": runtime.gpus_per_worker,
            "resources": dict(runtime.resources_per_worker),
            "max_restarts": 0,  # we see each death, and replace the actor if it is still wanted
        }
        return ACTOR.options(**options).remote(self._job.recipe.located().model_dump_json(), dict(self._job.made_of))

    def _await_ready(self, worker: _Worker) -> None:
        self._calls[worker.actor.ready.remote()] = worker

    # News of them

    def _look(self, queue: UnitQueue, timeout_s: float) -> None:
        """Wait for news of any actor, then take all there are."""
        if not self._calls:
            time.sleep(timeout_s)
            return
        calls = list(self._calls)
        if ray.wait(calls, timeout=timeout_s)[0]:
            for call in ray.wait(calls, num_returns=len(calls), timeout=0)[0]:
                worker = self._calls.pop(call)
                if worker.unit is None:
                    self._started(worker, call, queue)
                else:
                    self._worked(worker, worker.unit, call, queue)

    def _started(self, worker: _Worker, call: Any, queue: UnitQueue) -> None:
        try:
            place: Place = ray.get(call)
        except LOST as error:
            if not worker.node:
                self._stillborn(worker, error)
            self._await_again(worker, error)
        except RayTaskError as error:
            cause = _cause(error)
            ray.kill(worker.actor)
            if isinstance(cause, OutageError):
                self._setbacks.store_failed(cause)
            else:
                self._pause(last_line(cause))
                is_mistake = isinstance(cause, RecipeError) and not self.is_at_work
                if is_mistake or self._cannot_go_on or not (self._calls or self._idle):  # else it may be that machine
                    raise cause from None
        else:
            worker.node = place.node
            self._events.worker_ready(place.device)
            self._num_stillborn, self._pause_s = 0, 0.0
            self._give_work(worker, queue)

    def _stillborn(self, worker: _Worker, error: Exception) -> None:
        """One died that was never ready; where its machine is still there, the machine may not be to blame."""
        if not isinstance(error, ActorDiedError) or _was_preempted(error) or self._is_gone(node_of(worker.actor)):
            return
        self._pause(last_line(error))
        if self._cannot_go_on:
            raise RecipeError(
                f"runtime.workers: {self._num_stillborn} in a row died while they were built, of memory or of a "
                f"crash below Python; try fewer workers a machine, or --on local to see it ({last_line(error)})"
            ) from None

    @property
    def _cannot_go_on(self) -> bool:
        return self._num_stillborn >= MAX_STILLBORN and not self.is_at_work

    def _pause(self, reason: str) -> None:
        """Build no other worker for a while, longer after each that could not be built."""
        self._num_stillborn += 1
        if not self._pause_s:
            self._events.say("workers", f"one could not be built; trying again ({reason})")
        self._pause_s = min(MOST_PAUSE_S, 2 * self._pause_s + FIRST_PAUSE_S)
        self._next_birth = time.monotonic() + self._pause_s

    def _worked(self, worker: _Worker, unit: WorkUnit, call: Any, queue: UnitQueue) -> None:
        was_silent, worker.unit, worker.is_silent = worker.is_silent, None, False
        try:
            work: Work = ray.get(call)
        except LOST as error:
            worker.question = None
            if not was_silent:  # then the unit is with another worker
                self._lost(worker, unit, error, queue)
            self._await_again(worker, error)
            return
        except RayTaskError as error:
            cause = _cause(error)
            self._hear(worker, queue)
            if not was_silent:
                self._setbacks.unit_failed(unit, cause, queue)
            worker.num_failures += not isinstance(cause, OutageError)
        else:
            self._hear(worker, queue)
            self._pass_on(work.news, queue)
            self._patience.saw(time.monotonic() - worker.heard)
            if work.record is None:
                if not was_silent:
                    queue.lost(unit, preempted=True)
                self._events.lost(unit.id, "its machine is about to go; its state is saved")
                ray.kill(worker.actor)
                return
            self._num_stillborn = worker.num_failures = 0
            self._committed(work.record, unit, queue)
        if worker.num_failures >= MAX_FAILURES:
            ray.kill(worker.actor)
        else:
            self._give_work(worker, queue)

    def _committed(self, record: bytes, unit: WorkUnit, queue: UnitQueue) -> None:
        if queue.finished(unit):  # else another attempt came before
            commit = Commit.from_json(record)
            self._job.transfer_set.remember(commit)
            self._events.committed(commit, running=queue.num_running)

    def _lost(self, worker: _Worker, unit: WorkUnit, error: Exception, queue: UnitQueue) -> None:
        # Of several units that were lost with a machine at most one can be to blame, and nobody knows which.
        is_blameless = _was_preempted(error) or (self._is_gone(worker.node) and self._gone[worker.node])
        failure = queue.lost(unit, preempted=is_blameless)
        if failure is None:
            self._events.lost(unit.id, type(error).__name__)
        else:
            self._events.failed(failure, is_final=True)

    def _is_gone(self, node: str) -> bool:
        """Whether a machine is no longer there; notes whether several units were in work on it when that was seen."""
        if node not in self._gone and not is_there(node):
            self._gone[node] = any(worker.node == node for worker in self._busy())
        return node in self._gone

    def _give_work(self, worker: _Worker, queue: UnitQueue) -> None:
        worker.unit = queue.take()
        if worker.unit is None:
            self._idle.append(worker)
            return
        worker.heard, worker.step = time.monotonic(), 0
        self._calls[worker.actor.run.remote(worker.unit, queue.attempt_of(worker.unit))] = worker

    def _await_again(self, worker: _Worker, error: Exception) -> None:
        """Ask the actor again if it may only be unreachable; another one takes the place of a dead one."""
        if not isinstance(error, ActorDiedError):
            self._unreachable.append(worker)

    def _look_at_set(self, queue: UnitQueue) -> None:
        """Take note of what others have done to the set; waits for it where nothing seems to be left."""
        try:
            self._lookout.tell(queue)
        except OutageError as outage:
            self._setbacks.store_failed(outage)

    # How far they are

    def _ask_for_progress(self, queue: UnitQueue) -> None:
        """Pass on what busy actors say of their units; nobody waits for one that does not answer."""
        asked = {worker.question: worker for worker in self._busy() if worker.question is not None}
        if asked:
            for answer in ray.wait(list(asked), num_returns=len(asked), timeout=0)[0]:
                self._hear(asked[answer], queue)
        if time.monotonic() >= self._next_question:
            self._next_question = time.monotonic() + PROGRESS_S
            for worker in self._busy():
                if worker.question is None:
                    worker.question = worker.actor.progress.remote()

    def _hear(self, worker: _Worker, queue: UnitQueue) -> None:
        """Pass on the answer of an actor that was asked; once its unit is done it would be of no unit in work."""
        answer, worker.question = worker.question, None
        if answer is None:
            return
        with contextlib.suppress(*LOST, RayTaskError):
            news: list[UnitProgress] = ray.get(answer)
            self._pass_on(news, queue)
            step = max((progress.step for progress in news), default=0)
            if step > worker.step:
                now = time.monotonic()
                self._patience.saw(now - worker.heard)
                worker.heard, worker.step = now, step

    def _pass_on(self, news: list[UnitProgress], queue: UnitQueue) -> None:
        for progress in news:
            queue.progressed(progress.unit, progress.step)
            self._events.progressed(progress)

    def _watch(self, queue: UnitQueue) -> None:
        """Give units that do not get on to others; end workers that do not come back even then."""
        for call, worker in list(self._calls.items()):
            if worker.unit is None:
                continue
            silent_s = time.monotonic() - worker.heard
            if not worker.is_silent and self._patience.is_over(silent_s):
                worker.is_silent = True
                queue.lost(worker.unit, preempted=True)
                self._events.lost(worker.unit.id, f"no step for {silent_s:.0f} s; another worker makes it too")
            elif worker.is_silent and self._patience.is_over(silent_s / 2):
                del self._calls[call]
                ray.kill(worker.actor)
                self._patience.double()

    # The end

    def _wind_up(self, queue: UnitQueue, interruption: Interruption) -> None:
        """Let what is in work finish, or leave with its state saved."""
        is_told = False
        while (busy := self._busy()) and interruption.seconds < LEAVE_S:
            if interruption.seconds >= FINISH_S and not is_told:
                is_told = True
                for worker in busy:
                    worker.actor.leave.remote()
            calls = [call for call, worker in self._calls.items() if worker.unit is not None]
            for call in ray.wait(calls, timeout=POLL_S)[0]:
                self._end(self._calls.pop(call), call, queue)

    def _end(self, worker: _Worker, call: Any, queue: UnitQueue) -> None:
        unit, worker.unit = worker.unit, None
        assert unit is not None
        self._idle.append(worker)
        try:
            work: Work = ray.get(call)
        except (RayTaskError, *LOST):
            logger.debug("unit %s ended while the run did", unit.id, exc_info=True)
        else:
            self._hear(worker, queue)
            self._pass_on(work.news, queue)
            if work.record is not None:
                self._committed(work.record, unit, queue)


def _was_preempted(error: Exception) -> bool:
    return isinstance(error, RayActorError) and bool(error.preempted)


def _cause(error: RayTaskError) -> Exception:
    cause = error.cause
    return cause if isinstance(cause, Exception) else error
