"""Synthesis and distillation at once on a Ray cluster."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import ray
from torch import Tensor

from raydfkd.distributed.pool import SynthesisPool, capacity
from raydfkd.distributed.train import new_board, train_student
from raydfkd.interruption import Interruption
from raydfkd.job import Job, SynthesisOutcome, in_rounds
from raydfkd.progress import Monitor
from raydfkd.registry import RecipeError
from raydfkd.schedule import UnitQueue

POLL_S = 0.5


class RayExecutor:
    """Works on the cluster that the recipe names, one that runs here, or one started here for the occasion."""

    def synthesize(self, job: Job, monitor: Monitor) -> SynthesisOutcome:
        """See Executor."""
        _connect(job, monitor)
        with Interruption() as interruption:
            return _synthesize(job, monitor, job.begin_synthesis(), _nothing, interruption)

    def distill(self, job: Job, monitor: Monitor) -> Mapping[str, Tensor]:
        """See Executor."""
        _connect(job, monitor)
        return _Training(job, monitor).wait()

    def run(self, job: Job, monitor: Monitor) -> tuple[SynthesisOutcome, Mapping[str, Tensor]]:
        """See Executor."""
        _connect(job, monitor)
        if job.recipe.rounds > 1:
            return in_rounds(job, monitor, self)
        queue = job.begin_synthesis()  # before the student, who would take the end of an earlier run for this one's
        training = _Training(job, monitor)
        with Interruption() as interruption:
            outcome = _synthesize(job, monitor, queue, training.look, interruption)
        return outcome, training.wait()


def _synthesize(
    job: Job, monitor: Monitor, queue: UnitQueue, on_tick: Callable[[], None], interruption: Interruption
) -> SynthesisOutcome:
    SynthesisPool(job, monitor).run(queue, on_tick, interruption)
    return job.end_synthesis(queue)


def _nothing() -> None:
    pass


class _Training:
    """The Train job, waited for in a thread beside the one that drives the pool."""

    def __init__(self, job: Job, monitor: Monitor) -> None:
        self._monitor = monitor
        monitor.student_started()
        self._board = new_board()
        self._student: Mapping[str, Tensor] = {}
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(job,), name="student", daemon=True)
        self._thread.start()

    def _run(self, job: Job) -> None:
        try:
            self._student = train_student(job, self._board, until=job.until)
        except Exception as error:  # raised again in the main thread
            self._error = error

    def look(self) -> None:
        """Show what is new; raise what went wrong."""
        for entry in ray.get(self._board.take.remote()):
            self._monitor.student(entry)
        if self._error is not None:
            raise self._error

    def wait(self) -> Mapping[str, Tensor]:
        """Look on until the end; the student's state dict, empty where there was nothing to train on."""
        while self._thread.is_alive():
            self._thread.join(POLL_S)
            self.look()
        self.look()
        return self._student


def _connect(job: Job, monitor: Monitor) -> None:
    if ray.is_initialized():
        return
    address = job.recipe.runtime.address
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        # Without an address Ray joins what RAY_ADDRESS names or what runs on this machine, else starts a cluster.
        ray.init(None if address == "auto" else address, **options)
    except (ConnectionError, ValueError) as error:
        raise RecipeError(f"runtime.address is {address!r}: no Ray cluster answers there ({error}); use auto") from None
    has = capacity()
    monitor.say(
        "ray",
        f"{ray.__version__}   {has['CPU']:g} CPUs   {has['GPU']:g} GPUs",
    )
