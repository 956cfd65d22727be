"""A student's training as the driver of a run sees it: begun, looked at, paused, and ended in order."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayActorError
from torch import Tensor

from raydfkd.distributed.coordinator import Letters
from raydfkd.distributed.pool import LEAVE_S
from raydfkd.distributed.ray_internals import give_back_placement_groups
from raydfkd.distributed.train_driver import new_coordinator, train_student
from raydfkd.job import Job
from raydfkd.runner.events import Events
from raydfkd.runner.executor import tell_of_new_training
from raydfkd.runner.signals import Interruption
from raydfkd.units import Phase

POLL_S = 0.5
KILL_S = 5.0
"""How long a training that has not started may take to, so that it can be ended."""
NOW_S = 1.5
"""The same where the run is to end at once."""


class Training:
    """The student's training beside what the main thread does, begun and paused as there is room for it.

    It outlives the actors that it needs beside its workers: where one of them dies it begins again from its newest
    checkpoint. Where the run ends early, by an interruption or an error, the training does too, with a checkpoint if it
    can.

    Args:
        job: whose student is trained.
        phase: to whose end.
        events: told of the learning curve.
        interruption: ends the training.
    """

    def __init__(self, job: Job, phase: Phase, events: Events, interruption: Interruption) -> None:
        self._job, self._phase = job, phase
        self._events = events
        self._interruption = interruption
        self._thread: _Thread | None = None
        self._student: Mapping[str, Tensor] | None = None
        self._is_paused = False
        self._num_losses = 0
        self.is_waiting = False
        """Whether its workers wait for images."""
        tell_of_new_training(job, events)

    def __enter__(self) -> Training:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._thread is not None:
            self._wind_up(self._thread)

    def begin(self) -> None:
        """Begin or go on, unless it is under way or at its end."""
        if self._thread is None and self._student is None:
            self._events.student_started()
            self._thread = _Thread(self._job, self._phase, self._events.say, lambda: self._interruption.is_requested)

    def pause(self) -> None:
        """End with a checkpoint, so that others can have the room; ``begin`` goes on from it."""
        if self._thread is not None and not self._is_paused:
            self._is_paused = True
            self._thread.end()

    def look(self) -> None:
        """Show what is new; raise what went wrong. Once the run is interrupted, tell the training."""
        thread = self._thread
        if thread is None:
            return
        self._show(thread)
        if self._interruption.is_requested:
            thread.end()
        elif thread.is_done.is_set():
            self._show(thread)
            self._ended(thread)
        elif thread.is_lost:
            thread.kill()

    def wait(self) -> Mapping[str, Tensor]:
        """Look on until the end; the student's state dict, empty where there was nothing to train on.

        Raises:
            KeyboardInterrupt: the run was interrupted.
        """
        while self._student is None and not self._interruption.is_requested:
            self.begin()
            if self._thread is not None:
                self._thread.is_done.wait(POLL_S)
            self.look()
        if self._student is None:
            raise KeyboardInterrupt
        return self._student

    def _show(self, thread: _Thread) -> None:
        letters = thread.letters()
        for entry in letters.entries:
            self._events.student(entry)
            self._num_losses = 0
        for line in letters.lines:
            self._events.say("student", line)
        self.is_waiting = letters.is_waiting

    def _ended(self, thread: _Thread) -> None:
        self._thread, was_paused, self._is_paused = None, self._is_paused, False
        self.is_waiting = False
        if thread.error is None:
            self._student = None if was_paused else thread.student
            return
        self._num_losses += 1
        if not (was_paused or thread.is_lost) or self._num_losses > self._job.recipe.runtime.max_losses:
            raise thread.error
        if not was_paused:
            self._events.say("student", "an actor that its training needs was lost; goes on from the newest checkpoint")
            self.begin()

    def _wind_up(self, thread: _Thread) -> None:
        """Let the training make a checkpoint and end, unless it is to end at once."""
        try:
            is_begun = thread.end()  # else there is nothing to save
            until = time.monotonic() + LEAVE_S - self._interruption.seconds
            while is_begun and time.monotonic() < until and not self._interruption.is_repeated:
                if thread.is_done.wait(POLL_S):
                    break
            self._show(thread)
        finally:
            # Ray ends a process with status 1 in which a thread is still waiting for it at the end.
            until = time.monotonic() + (NOW_S if self._interruption.is_repeated else KILL_S)
            while not thread.is_done.wait(POLL_S / 5) and time.monotonic() < until:
                thread.kill()


class _Thread:
    """The Train job, waited for in a thread."""

    def __init__(self, job: Job, phase: Phase, say: Callable[[str, str], None], is_over: Callable[[], bool]) -> None:
        self._say = say
        self._is_over, self._is_ended = is_over, False
        self._coordinator = new_coordinator()
        self._controller: list[Any] = []
        self.student: Mapping[str, Tensor] = {}
        self.error: Exception | None = None
        self.is_lost = False
        """Whether an actor that the training needs beside its workers was lost."""
        self.is_done = threading.Event()  # unlike a thread's end, safe to await where Ctrl-C raises (bpo-45274)
        threading.Thread(target=self._run, args=(job, phase), name="student", daemon=True).start()

    def _run(self, job: Job, phase: Phase) -> None:
        try:
            self.student = train_student(
                job,
                phase,
                self._coordinator,
                on_wait=lambda who: self._say("student", f"{who} trains it in this run_dir; waiting for it"),
                is_over=lambda: self._is_ended or self._is_over(),
            )
        except Exception as error:  # raised again in the main thread
            self.error = error
            self.is_lost = self.is_lost or isinstance(error, RayActorError)
        finally:
            with contextlib.suppress(Exception):  # the cluster may be gone, and its room with it
                give_back_placement_groups()
            self.is_done.set()

    def letters(self) -> Letters:
        """What has come since the last call; nothing from a coordinator that was lost."""
        try:
            letters: Letters = ray.get(self._coordinator.take.remote())
        except RayActorError:
            self.is_lost = True
            return Letters(entries=[], lines=[], controller=[], is_waiting=False)
        self._controller = letters.controller
        return letters

    def end(self) -> bool:
        """Have the training make a checkpoint and end; returns whether it has begun and will hear of it."""
        self._is_ended = True
        with contextlib.suppress(RayActorError):
            return bool(ray.get(self._coordinator.end.remote()))
        return False

    def kill(self) -> None:
        """End the actor that controls the training, if it runs by now, and its workers with it."""
        self.letters()
        for controller in self._controller:
            ray.kill(controller)
