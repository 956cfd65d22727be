"""The executor without Ray: everything in this process, one thing after another."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from raydfkd.devices import pick_device
from raydfkd.distill.training import StudentCheckpoint, StudentTraining
from raydfkd.job import Job, SynthesisOutcome
from raydfkd.run.executor import in_rounds
from raydfkd.run.progress import Monitor
from raydfkd.run.signals import Interruption
from raydfkd.synthesis.checkpoint import Interrupted
from raydfkd.synthesis.worker import SynthesisWorker
from raydfkd.units import UnitQueue, WorkUnit

logger = logging.getLogger(__name__)
FINISH_S = 6.0
"""How long the unit in work may still finish once the run is interrupted; after that it is left, its state saved."""


class LocalExecutor:
    """Synthesizes unit by unit, then trains the student, here."""

    def synthesize(self, job: Job, monitor: Monitor) -> SynthesisOutcome:
        """See Executor."""
        queue = job.begin_synthesis()
        if not queue.is_drained:
            monitor.synthesis_started()
            with Interruption(partial(monitor.say, "stop")) as interruption:
                self._work(job, queue, monitor, interruption)
        return job.end_synthesis(queue)

    def _work(self, job: Job, queue: UnitQueue, monitor: Monitor, interruption: Interruption) -> None:
        worker = SynthesisWorker(
            job.recipe,
            job.transfer_set,
            device=pick_device(job.recipe.runtime.device),
            should_stop=lambda: interruption.seconds >= FINISH_S,
        )
        while (unit := self._next(job, queue)) is not None:
            if interruption.is_requested:
                raise KeyboardInterrupt
            try:
                commit = worker.run(unit, queue.attempt_of(unit))
            except Interrupted:
                raise KeyboardInterrupt from None
            except Exception as error:  # the edge of a unit: whatever it was, the others go on
                logger.debug("unit %s failed", unit.id, exc_info=True)
                failure = queue.failed(unit, f"{type(error).__name__}: {error}")
                monitor.failed(failure, is_final=queue.is_given_up(unit))
            else:
                queue.finished(unit)
                monitor.committed(commit, running=queue.num_running)

    def _next(self, job: Job, queue: UnitQueue) -> WorkUnit | None:
        if queue.is_drained:
            job.catch_up(queue)
        return queue.take()

    def distill(self, job: Job, monitor: Monitor) -> Mapping[str, Tensor]:
        """See Executor."""
        checkpoint = StudentCheckpoint(Path(job.recipe.run_dir) / "train", job.student_digest)
        training = StudentTraining(
            job, on_log=monitor.student, on_checkpoint=checkpoint.save, on_publish=job.publisher()
        )
        saved = checkpoint.load()
        if saved is not None:
            training.load_state_dict(saved)
            monitor.say("student", f"going on from step {training.trainer.step:,}")
        return training.run(until=job.until)

    def run(self, job: Job, monitor: Monitor) -> tuple[SynthesisOutcome, Mapping[str, Tensor]]:
        """See Executor."""
        return in_rounds(job, monitor, self)
