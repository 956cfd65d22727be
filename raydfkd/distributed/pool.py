"""Synthesis on an elastic pool of actors."""

from __future__ import annotations

import contextlib
import logging
import time
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
from raydfkd.distributed.actor import SynthesisActor, Work
from raydfkd.errors import RecipeError, last_line
from raydfkd.job import Job
from raydfkd.runner.events import Events
from raydfkd.runner.signals import Interruption
from raydfkd.store.errors import OutageError
from raydfkd.units import UnitProgress, UnitQueue, WorkUnit

logger = logging.getLogger(__name__)
POLL_S = 0.5
PROGRESS_S = 2.0
"""Seconds between questions to busy workers how far their units are."""
SYNC_S = 5.0
"""Seconds between looks at what others have committed to the set or taken out of it."""
FINISH_S = 6.0
"""How long units in work may still finish once the run is interrupted; after that they are left, their state saved."""
LEAVE_S = 10.0
"""When workers are ended that have neither finished nor left by then."""
OUTAGE_S = 1800.0
"""How long the store may be out of reach before the run ends."""
QUIET_S = 300.0
"""After so long without news of an outage it was over."""
MAX_STILLBORN = 5
"""Deaths in a row of workers that are being built, preempted machines aside, that end the run."""
LOST = (RayActorError, NodeDiedError, OutOfMemoryError, WorkerCrashedError)
"""What Ray raises when a machine or process went away under a call: not a failure, but see UnitQueue.lost."""


class SynthesisPool:
    """Keeps up to ``runtime.workers.max`` actors busy with the units of a queue.

    As many actors are requested as there are units for, up to that number: those that find no room stay pending, which
    is what an autoscaler sees as demand, and join when a node does. One that dies is replaced. When the queue drains,
    actors without a unit are ended, down to ``runtime.workers.min``, so that their machines can go.

    Args:
        job: whose units are worked on.
        events: told of commits, losses and failures.
    """

    def __init__(self, job: Job, events: Events) -> None:
        self._job = job
        self._events = events
        self._workers = job.recipe.runtime.workers
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._unreachable: list[Any] = []
        self._busy: dict[Any, tuple[Any, WorkUnit]] = {}
        self._num_stillborn = 0
        self._outage = (float("-inf"), float("-inf"))
        self._next_sync = time.monotonic() + SYNC_S
        self._asked: dict[Any, Any] = {}
        self._next_question = time.monotonic()

    def run(self, queue: UnitQueue, on_tick: Callable[[], None], interruption: Interruption) -> None:
        """Work until the queue is drained; ``on_tick`` is called twice a second or more often.

        Raises:
            RecipeError: workers cannot be built.
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
                for actor in [self._idle.pop() for _ in range(len(self._idle))]:
                    self._give_work(actor, queue)
                self._sync(queue)
                self._ask_for_progress()
                on_tick()
            if interruption.is_requested:
                on_tick()  # who trains beside it need not wait until it is wound up
                self._wind_up(queue, interruption)
                raise KeyboardInterrupt
        finally:
            for actor in self._actors():
                ray.kill(actor)

    def _actors(self) -> list[Any]:
        busy = [actor for actor, _ in self._busy.values()]
        return [*self._idle, *self._unreachable, *self._starting.values(), *busy]

    def _resize(self, queue: UnitQueue) -> None:
        """As many actors as there are units to work on, within bounds."""
        while self._unreachable:
            self._await_ready(self._unreachable.pop())
        num_actors = len(self._idle) + len(self._starting) + len(self._busy)
        for _ in range(min(self._workers.max, queue.num_open) - num_actors):
            self._await_ready(self._new_actor())
        for _ in range(num_actors - max(self._workers.min, queue.num_open)):
            if self._starting:
                _, actor = self._starting.popitem()
            elif self._idle:
                actor = self._idle.pop()
            else:
                break
            ray.kill(actor)

    def _new_actor(self) -> Any:
        runtime = self._job.recipe.runtime
        decorated: Any = ray.remote(concurrency_groups={"control": 1})  # type: ignore[call-overload]  # not in its stub
        remote = decorated(SynthesisActor).options(
            num_cpus=runtime.cpus_per_worker,
            num_gpus=runtime.gpus_per_worker,
            resources=dict(runtime.resources_per_worker),
            max_restarts=0,  # we see each death, and replace the actor if it is still wanted
        )
        return remote.remote(self._job.recipe.located().model_dump_json(), dict(self._job.made_of))

    def _await_ready(self, actor: Any) -> None:
        self._starting[actor.ready.remote()] = actor

    def _look(self, queue: UnitQueue, timeout_s: float) -> None:
        """Wait for news of any actor, then take all there are."""
        waiting = [*self._starting, *self._busy]
        if not waiting:
            time.sleep(timeout_s)
            return
        if ray.wait(waiting, timeout=timeout_s)[0]:
            for reference in ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]:
                if reference in self._starting:
                    self._started(reference, queue)
                else:
                    self._worked(reference, queue)

    def _started(self, reference: Any, queue: UnitQueue) -> None:
        actor = self._starting.pop(reference)
        try:
            ray.get(reference)
        except LOST as error:
            self._num_stillborn += isinstance(error, ActorDiedError) and not _was_preempted(error)
            if self._num_stillborn >= MAX_STILLBORN:
                reason = last_line(error)
                raise RecipeError(
                    f"runtime.workers: {self._num_stillborn} in a row died while they were built, of memory or of a "
                    f"crash below Python; try fewer workers a machine, or --on local to see it ({reason})"
                ) from None
            self._await_again(actor, error)
        except RayTaskError as error:
            cause = _cause(error)
            if not isinstance(cause, OutageError):
                raise cause from None
            self._wait_for_store(cause)
            ray.kill(actor)
        else:
            self._num_stillborn = 0
            self._give_work(actor, queue)

    def _worked(self, reference: Any, queue: UnitQueue) -> None:
        actor, unit = self._busy.pop(reference)
        try:
            work: Work = ray.get(reference)
        except LOST as error:
            self._asked = {answer: other for answer, other in self._asked.items() if other is not actor}
            self._lost(unit, error, queue)
            self._await_again(actor, error)
            return
        except RayTaskError as error:
            self._hear(actor)
            self._failed(unit, _cause(error), queue)
        else:
            self._hear(actor)
            self._pass_on(work.news)
            if work.record is None:
                queue.lost(unit, preempted=True)
                self._events.lost(unit.id, "its machine is about to go; its state is saved")
                ray.kill(actor)
                return
            queue.finished(unit)
            self._events.committed(Commit.from_json(work.record), running=queue.num_running)
        self._give_work(actor, queue)

    def _failed(self, unit: WorkUnit, cause: Exception, queue: UnitQueue) -> None:
        logger.debug("unit %s failed", unit.id, exc_info=cause)
        if isinstance(cause, OutageError):  # which the unit can do nothing about
            queue.lost(unit, preempted=True)
            self._wait_for_store(cause)
            return
        failure = queue.failed(unit, f"{type(cause).__name__}: {cause}")
        self._events.failed(failure, is_final=queue.is_given_up(unit))

    def _wait_for_store(self, outage: OutageError) -> None:
        """Let the run go on without its store for a while."""
        now = time.monotonic()
        began, last = self._outage
        if now - last > QUIET_S:
            began = now
            self._events.say("store", f"{outage}; going on as soon as it can")
        elif now - began > OUTAGE_S:
            raise outage
        self._outage = (began, now)

    def _lost(self, unit: WorkUnit, error: Exception, queue: UnitQueue) -> None:
        failure = queue.lost(unit, preempted=_was_preempted(error))
        if failure is None:
            self._events.lost(unit.id, type(error).__name__)
        else:
            self._events.failed(failure, is_final=True)

    def _give_work(self, actor: Any, queue: UnitQueue) -> None:
        unit = queue.take()
        if unit is not None:
            self._busy[actor.run.remote(unit, queue.attempt_of(unit))] = (actor, unit)
        else:
            self._idle.append(actor)

    def _await_again(self, actor: Any, error: Exception) -> None:
        """Ask the actor again if it may only be unreachable; another one takes the place of a dead one."""
        if not isinstance(error, ActorDiedError):
            self._unreachable.append(actor)

    def _sync(self, queue: UnitQueue) -> None:
        """Take note of what others have done to the set; always where nothing seems to be left."""
        if queue.is_drained or time.monotonic() >= self._next_sync:
            try:
                news = self._job.news(at_once=queue.is_drained)
                if news is not None:
                    self._job.catch_up(queue, news)
            except OutageError as outage:
                self._wait_for_store(outage)
            self._next_sync = time.monotonic() + SYNC_S

    def _ask_for_progress(self) -> None:
        """Pass on what busy actors say of their units; nobody waits for one that is silent."""
        if self._asked:
            for answer in ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)[0]:
                del self._asked[answer]
                with contextlib.suppress(*LOST, RayTaskError):
                    self._pass_on(ray.get(answer))
        if time.monotonic() >= self._next_question:
            self._next_question = time.monotonic() + PROGRESS_S
            waited_for = list(self._asked.values())
            for actor, _ in self._busy.values():
                if all(actor is not other for other in waited_for):
                    self._asked[actor.progress.remote()] = actor

    def _hear(self, actor: Any) -> None:
        """Pass on what an actor that is done with its unit was asked before: later it would be of no unit in work."""
        for answer in [answer for answer, other in self._asked.items() if other is actor]:
            del self._asked[answer]
            with contextlib.suppress(*LOST, RayTaskError):
                self._pass_on(ray.get(answer))

    def _pass_on(self, news: list[UnitProgress]) -> None:
        for progress in news:
            self._events.progressed(progress)

    def _wind_up(self, queue: UnitQueue, interruption: Interruption) -> None:
        """Let what is in work finish, or leave with its state saved."""
        is_told = False
        while self._busy and interruption.seconds < LEAVE_S:
            if interruption.seconds >= FINISH_S and not is_told:
                is_told = True
                for actor, _ in self._busy.values():
                    actor.leave.remote()
            for reference in ray.wait(list(self._busy), timeout=POLL_S)[0]:
                self._end(reference, queue)

    def _end(self, reference: Any, queue: UnitQueue) -> None:
        actor, unit = self._busy.pop(reference)
        self._idle.append(actor)
        try:
            work: Work = ray.get(reference)
        except (RayTaskError, *LOST):
            logger.debug("unit %s ended while the run did", unit.id, exc_info=True)
        else:
            self._hear(actor)
            self._pass_on(work.news)
            if work.record is not None:
                queue.finished(unit)
                self._events.committed(Commit.from_json(work.record), running=len(self._busy))


def _was_preempted(error: Exception) -> bool:
    return isinstance(error, RayActorError) and bool(error.preempted)


def _cause(error: RayTaskError) -> Exception:
    cause = error.cause
    return cause if isinstance(cause, Exception) else error
