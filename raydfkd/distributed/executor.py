"""Synthesis and distillation at once on a Ray cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType

import ray
from torch import Tensor
from typing_extensions import override

from raydfkd.distillation.trainer import ignore
from raydfkd.distributed.connection import connected
from raydfkd.distributed.pool import LEAVE_S, SynthesisPool
from raydfkd.distributed.room import check_room, must_take_turns
from raydfkd.distributed.train_driver import new_coordinator, train_student
from raydfkd.job import Job, SynthesisOutcome
from raydfkd.networks.teacher import Teacher
from raydfkd.runner.events import Events
from raydfkd.runner.executor import Executor, one_after_the_other, tell_of_new_training
from raydfkd.runner.signals import Interruption
from raydfkd.units import Phase, UnitQueue

POLL_S = 0.5
KILL_S = 5.0
"""How long a training that has not started may take to, so that it can be ended."""
NOW_S = 1.5
"""The same where the run is to end at once."""


class RayExecutor(Executor):
    """Works on the cluster that the recipe names, one that runs here, or one started here for the occasion."""

    @override
    def synthesize(self, job: Job, phase: Phase, teacher: Teacher, events: Events) -> SynthesisOutcome:
        with connected(job.recipe.runtime.address, events.say):
            check_room(job, events.say, training=False)
            return _Turns().synthesize(job, phase, teacher, events)

    @override
    def distill(self, job: Job, phase: Phase, teacher: Teacher, events: Events) -> Mapping[str, Tensor]:
        with connected(job.recipe.runtime.address, events.say):
            check_room(job, events.say, synthesis=False)
            return _Turns().distill(job, phase, teacher, events)

    @override
    def run(self, job: Job, teacher: Teacher, events: Events) -> tuple[SynthesisOutcome, Mapping[str, Tensor]]:
        with connected(job.recipe.runtime.address, events.say):
            check_room(job, events.say)
            if len(job.phases) > 1 or must_take_turns(job, events.say):
                return _Turns().run(job, teacher, events)
            queue = job.begin_synthesis()  # before the student, who would take the end of an earlier run for this one's
            with (
                Interruption(partial(events.say, "stop")) as interruption,
                _Training(job, job.phases[0], events, interruption) as training,
            ):
                outcome = _synthesize(job, events, queue, training.look, interruption)
                return outcome, training.wait()


class _Turns(Executor):
    """Synthesis or training by itself, on the cluster that this process is connected to."""

    @override
    def synthesize(self, job: Job, phase: Phase, teacher: Teacher, events: Events) -> SynthesisOutcome:
        with Interruption(partial(events.say, "stop")) as interruption:
            return _synthesize(job, events, job.begin_synthesis(phase), ignore, interruption)

    @override
    def distill(self, job: Job, phase: Phase, teacher: Teacher, events: Events) -> Mapping[str, Tensor]:
        with (
            Interruption(partial(events.say, "stop")) as interruption,
            _Training(job, phase, events, interruption) as training,
        ):
            return training.wait()

    @override
    def run(self, job: Job, teacher: Teacher, events: Events) -> tuple[SynthesisOutcome, Mapping[str, Tensor]]:
        return one_after_the_other(job, teacher, events, self)


def _synthesize(
    job: Job,
    events: Events,
    queue: UnitQueue,
    on_tick: Callable[[], None],
    interruption: Interruption,
) -> SynthesisOutcome:
    SynthesisPool(job, events).run(queue, on_tick, interruption)
    return job.end_synthesis(queue)


class _Training:
    """The Train job, waited for in a thread beside the one that drives the pool.

    Where the run ends early, by an interruption or an error, the training does too, with a checkpoint if it can.
    """

    def __init__(self, job: Job, phase: Phase, events: Events, interruption: Interruption) -> None:
        self._events = events
        self._interruption = interruption
        self._is_over = False
        tell_of_new_training(job, events)
        events.student_started()
        self.coordinator = new_coordinator()
        self._student: Mapping[str, Tensor] = {}
        self._error: Exception | None = None
        self._is_done = threading.Event()  # unlike a thread's end, safe to await where Ctrl-C raises (bpo-45274)
        threading.Thread(target=self._run, args=(job, phase), name="student", daemon=True).start()

    def _run(self, job: Job, phase: Phase) -> None:
        try:
            self._student = train_student(
                job, phase, self.coordinator, on_wait=self._say_who_trains, is_over=self._is_wound_up
            )
        except Exception as error:  # raised again in the main thread
            self._error = error
        finally:
            self._is_done.set()

    def __enter__(self) -> _Training:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._wind_up()

    def _say_who_trains(self, who: str) -> None:
        self._events.say("student", f"{who} trains it in this run_dir; waiting for it")

    def _is_wound_up(self) -> bool:
        return self._is_over or self._interruption.is_requested

    def look(self) -> None:
        """Show what is new; raise what went wrong. Once the run is interrupted, tell the training."""
        self._show()
        if self._interruption.is_requested:
            self.coordinator.end.remote()
        elif self._error is not None:
            raise self._error

    def wait(self) -> Mapping[str, Tensor]:
        """Look on until the end; the student's state dict, empty where there was nothing to train on.

        Raises:
            KeyboardInterrupt: the run was interrupted.
        """
        while not self._is_done.wait(POLL_S) and not self._interruption.is_requested:
            self.look()
        if self._interruption.is_requested:
            raise KeyboardInterrupt
        self.look()
        return self._student

    def _wind_up(self) -> None:
        """Let the training make a checkpoint and end, unless it is to end at once."""
        self._is_over = True
        try:
            is_begun = ray.get(self.coordinator.end.remote())  # else there is nothing to save
            until = time.monotonic() + LEAVE_S - self._interruption.seconds
            while is_begun and time.monotonic() < until and not self._interruption.is_repeated:
                if self._is_done.wait(POLL_S):
                    break
            self._show()
        finally:
            self._kill()

    def _kill(self) -> None:
        """End the thread: Ray ends a process with status 1 in which one is still waiting for it at the end."""
        until = time.monotonic() + (NOW_S if self._interruption.is_repeated else KILL_S)
        while not self._is_done.wait(POLL_S / 5) and time.monotonic() < until:
            for controller in ray.get(self.coordinator.controller.remote()):
                ray.kill(controller)

    def _show(self) -> None:
        for entry in ray.get(self.coordinator.take.remote()):
            self._events.student(entry)
        for line in ray.get(self.coordinator.take_lines.remote()):
            self._events.say("student", line)
