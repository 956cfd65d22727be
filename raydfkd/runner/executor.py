"""Executors: they do the work of a job in this process or on a Ray cluster."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from raydfkd.config.recipe import Recipe
from raydfkd.distillation.training import note_training
from raydfkd.job import Job, SynthesisOutcome
from raydfkd.networks.teacher import Teacher
from raydfkd.runner.events import Events
from raydfkd.units import Phase

EXECUTORS = {"local": "raydfkd.runner.local:LocalExecutor", "ray": "raydfkd.distributed.executor:RayExecutor"}
"""Module and class of each executor; named rather than imported, since the one for Ray imports this package."""


class Executor(Protocol):
    """Does the work of a job, in this process or on a Ray cluster."""

    def synthesize(self, job: Job, phase: Phase, teacher: Teacher, events: Events) -> SynthesisOutcome:
        """Work until every unit of the phase is committed or given up; the set is closed then."""

    def distill(self, job: Job, phase: Phase, teacher: Teacher, events: Events) -> Mapping[str, Tensor]:
        """Train the student to the end of the phase, on a set that is complete or growing; returns its state dict.

        Empty where there was no image to train on.
        """

    def run(self, job: Job, teacher: Teacher, events: Events) -> tuple[SynthesisOutcome, Mapping[str, Tensor]]:
        """Do every phase, its synthesis and training at once where that is possible; returns as the two do."""


def executor_of(recipe: Recipe) -> Executor:
    """The executor that the recipe names."""
    executor: Executor = pkgutil.resolve_name(EXECUTORS[recipe.runtime.executor])()
    return executor


def tell_of_new_training(job: Job, events: Events) -> None:
    """Note the training in its folder, and say why it begins again where another was there."""
    changed = note_training(job)
    if changed:
        events.say("student", f"trains from the beginning, since another was asked for: {changed}")


def one_after_the_other(
    job: Job, teacher: Teacher, events: Events, executor: Executor
) -> tuple[SynthesisOutcome, Mapping[str, Tensor]]:
    """Synthesize, then train, phase by phase."""
    attempted = 0
    for phase in job.phases:
        outcome = executor.synthesize(job, phase, teacher, events)
        student = executor.distill(job, phase, teacher, events)
        attempted += outcome.attempted
    return SynthesisOutcome(attempted=attempted, given_up=outcome.given_up), student
