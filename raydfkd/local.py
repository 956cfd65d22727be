"""The executor without Ray: everything in this process, one thing after another."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from raydfkd.distill.training import StudentCheckpoint, StudentTraining
from raydfkd.job import Job, SynthesisOutcome
from raydfkd.progress import Monitor
from raydfkd.synthesis.worker import SynthesisWorker, pick_device

logger = logging.getLogger(__name__)


class LocalExecutor:
    """Synthesizes unit by unit, then trains the student, here."""

    def synthesize(self, job: Job, monitor: Monitor) -> SynthesisOutcome:
        """See Executor."""
        queue = job.begin_synthesis()
        if not queue.is_drained:
            worker = SynthesisWorker(job.recipe, job.transfer_set, device=pick_device(job.recipe.runtime.device))
            monitor.synthesis_started()
        while (unit := queue.take()) is not None:
            try:
                commit = worker.run(unit, queue.attempt_of(unit))
            except Exception as error:  # the edge of a unit: whatever it was, the others go on
                logger.debug("unit %s failed", unit.id, exc_info=True)
                failure = queue.failed(unit, f"{type(error).__name__}: {error}")
                monitor.failed(failure, is_final=queue.is_quarantined(unit))
            else:
                queue.finished(unit)
                monitor.committed(commit, running=queue.num_running)
        return job.end_synthesis(queue)

    def distill(self, job: Job, monitor: Monitor) -> Mapping[str, Tensor]:
        """See Executor."""
        checkpoint = StudentCheckpoint(Path(job.recipe.run_dir) / "train", job.student_digest)
        training = StudentTraining(job, on_log=monitor.student, on_checkpoint=checkpoint.save)
        saved = checkpoint.load()
        if saved is not None:
            training.load_state_dict(saved)
            monitor.say("student", f"going on from step {training.trainer.step:,}")
        return training.run()

    def run(self, job: Job, monitor: Monitor) -> tuple[SynthesisOutcome, Mapping[str, Tensor]]:
        """See Executor."""
        return self.synthesize(job, monitor), self.distill(job, monitor)
