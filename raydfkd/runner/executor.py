"""Where the work of a job happens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from raydfkd.job import Job, SynthesisOutcome
from raydfkd.runner.progress import Monitor


def in_rounds(job: Job, monitor: Monitor, executor: Executor) -> tuple[SynthesisOutcome, Mapping[str, Tensor]]:
    """Synthesis and training in turns, as often as the recipe has rounds."""
    attempted = 0
    for part in job.rounds():
        outcome, student = executor.synthesize(part, monitor), executor.distill(part, monitor)
        attempted += outcome.attempted
    return replace(outcome, attempted=attempted), student


class Executor(Protocol):
    """Where the work happens: this process or a Ray cluster."""

    def synthesize(self, job: Job, monitor: Monitor) -> SynthesisOutcome:
        """Work until every unit is committed or set aside; the set is closed then."""

    def distill(self, job: Job, monitor: Monitor) -> Mapping[str, Tensor]:
        """Train the student on a set that is complete or growing; returns its state dict."""

    def run(self, job: Job, monitor: Monitor) -> tuple[SynthesisOutcome, Mapping[str, Tensor]]:
        """Both, at once where that is possible."""
