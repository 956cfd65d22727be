"""The best student for a number of device-seconds: how many units, then how many student steps, fit into them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from raydfkd.config.recipe import Recipe
from raydfkd.devices import pick_device
from raydfkd.distillation.trainer import TrainingHooks
from raydfkd.distillation.training import StudentTraining
from raydfkd.errors import RecipeError
from raydfkd.job import Job, job_of, open_job
from raydfkd.networks.teacher import Teacher, open_teacher
from raydfkd.runner.events import Events
from raydfkd.runner.local import LocalExecutor
from raydfkd.runner.run import save_student

Clock = Callable[[], float]
"""Device-seconds used so far."""
PROBE_STEPS = 8
"""Student steps that are timed before their number is chosen."""
MARGIN = 0.97
"""Share of what is left that is planned with, because steps vary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a budget bought."""

    recipe: Recipe
    """With the number of images and steps that fitted."""
    student: Path
    images: int
    student_steps: int
    synthesis_seconds: float
    """Device-seconds until the set was complete."""
    seconds: float
    """Device-seconds in all, probes and start of the networks included."""


def device_clock(device: torch.device) -> Clock:
    """CPU seconds of this process with all its threads; on a GPU seconds, once what it was given is done."""
    if device.type == "cpu":
        return time.process_time

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def run_within(recipe: Recipe, seconds: float, *, events: Events) -> Outcome:
    """Synthesize in this process for the recipe's ``synthesis_share`` of ``seconds``, distil for the rest.

    The set grows by whole rounds (a unit for each class); at least one is made, however short the budget.

    Raises:
        RecipeError: the recipe has rounds, or a unit was set aside, so that the figures would be of another recipe.
    """
    if recipe.rounds > 1:
        raise RecipeError(f"rounds is {recipe.rounds}, but a budget is for one synthesis and one training; use 1")
    clock = device_clock(pick_device(recipe.runtime.device))
    started = clock()
    teacher = open_teacher(recipe)
    job = _synthesize(open_job(recipe, teacher), teacher, rounds=1, events=events)
    a_round = clock() - started
    rounds = max(1, int(seconds * recipe.budget.synthesis_share / a_round))
    if rounds > 1:
        job = _synthesize(job, teacher, rounds=rounds, events=events)
    synthesized = clock() - started
    a_step = _student_step(job, teacher, clock)
    left = seconds - (clock() - started)
    steps = max(1, int(left * MARGIN / a_step))
    job = _with_distill(job, steps=steps)
    student = save_student(job, LocalExecutor().distill(job, job.phases[-1], teacher, events))
    return Outcome(
        recipe=job.recipe,
        student=student,
        images=job.planned_images,
        student_steps=steps,
        synthesis_seconds=synthesized,
        seconds=clock() - started,
    )


def _synthesize(job: Job, teacher: Teacher, *, rounds: int, events: Events) -> Job:
    spec = job.recipe.transfer_set
    spec = spec.model_copy(update={"images_per_class": rounds * spec.unit.images_per_class})
    job = job_of(job.recipe.model_copy(update={"transfer_set": spec}), job.made_of)  # of which the number is no part
    outcome = LocalExecutor().synthesize(job, job.phases[-1], teacher, events)
    if outcome.given_up:
        failure = outcome.given_up[0]
        raise RecipeError(f"synthesis: unit {failure.unit} was set aside ({failure.error})")
    return job


def _with_distill(job: Job, **changes: int) -> Job:
    distill = job.recipe.distill.model_copy(update=changes)
    return job_of(job.recipe.model_copy(update={"distill": distill}), job.made_of)


def _student_step(job: Job, teacher: Teacher, clock: Clock) -> float:
    """Device-seconds of one step, of a student that is thrown away."""
    marks: list[float] = []
    short = _with_distill(job, steps=2 * PROBE_STEPS, log_every=PROBE_STEPS)
    hooks = TrainingHooks(on_log=lambda _: marks.append(clock()))
    probe = StudentTraining(short, teacher, short.phases[-1], hooks=hooks)
    probe.run()
    return (marks[-1] - marks[-2]) / PROBE_STEPS
