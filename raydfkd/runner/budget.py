"""The best student for a number of device-seconds: both synthesis and training end by the clock."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from raydfkd.config.recipe import Recipe
from raydfkd.data.transfer_set import TransferSet
from raydfkd.devices import cpu_threads, keep_freed_memory, pick_device
from raydfkd.distillation.trainer import TrainingHooks, ignore
from raydfkd.distillation.training import StudentTraining
from raydfkd.errors import RecipeError
from raydfkd.job import Job, open_job
from raydfkd.networks.teacher import Teacher, open_teacher
from raydfkd.runner.run import save_student
from raydfkd.synthesis.build import build_synthesizer, is_live
from raydfkd.synthesis.judge import ObjectiveNotFiniteError
from raydfkd.synthesis.synthesizer import Synthesizer
from raydfkd.units import Phase, WorkUnit

Clock = Callable[[], float]
"""Device-seconds used so far."""
MARGIN = 0.02
"""Share of the training's time that is left for what follows its last step: BatchNorm statistics and a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The student, images and steps that a budget bought."""

    recipe: Recipe
    """The recipe with the number of images and steps that fitted."""
    student: Path
    images: int
    student_steps: int
    synthesis_seconds: float
    """Device-seconds until the set was complete."""
    seconds: float
    """Device-seconds in all, start of the networks included."""
    wall_seconds: float
    """Seconds in all; more than ``seconds`` where the CPU had others to serve."""


def device_clock(device: torch.device) -> Clock:
    """CPU seconds of this process with all its threads; on a GPU seconds, once what it was given is done.

    A neighbour who shares caches and cores makes CPU seconds longer too, by half at worst.
    """
    if device.type == "cpu":
        return time.process_time

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def run_within(recipe: Recipe, seconds: float) -> Outcome:
    """Synthesize in this process for the recipe's ``synthesis_share`` of ``seconds``, distil for the rest.

    The set ends with the piece whose end is nearest to that share; a piece is a batch where a unit holds all classes,
    so that units are cut short, else a round of units. The learning rate follows the clock, so that its schedule ends
    when the time is over, however fast the steps are. At least one piece and one step are made, however short the
    budget.

    Raises:
        RecipeError: the recipe has rounds, so there is more than one synthesis and training.
    """
    if recipe.rounds > 1:
        raise RecipeError(f"rounds is {recipe.rounds}, but a budget is for one synthesis and one training; use 1")
    if is_live(recipe):
        raise RecipeError(
            "distill.source is live, but a budget is for a synthesis and a training after it; use snapshot"
        )
    device = pick_device(recipe.runtime.device)
    if device.type == "cpu":
        keep_freed_memory()
    clock, began_at = device_clock(device), time.monotonic()
    began = clock()
    teacher = open_teacher(recipe)
    job = _synthesize(recipe, teacher, device, clock, until=began + seconds * recipe.budget.synthesis_share)
    synthesized = clock()
    training = StudentTraining(job, teacher, job.phases[-1], hooks=TrainingHooks(on_log=ignore))
    end = synthesized + (began + seconds - synthesized) * (1 - MARGIN)
    state = training.run(pace=_pace(clock, until=end, steps=recipe.distill.steps))
    distill = recipe.distill.model_copy(update={"steps": training.trainer.step})
    job = replace(job, recipe=job.recipe.model_copy(update={"distill": distill}))
    student = save_student(job, state)
    return Outcome(
        recipe=job.recipe,
        student=student,
        images=job.planned_images,
        student_steps=training.trainer.step,
        synthesis_seconds=synthesized - began,
        seconds=clock() - began,
        wall_seconds=time.monotonic() - began_at,
    )


def _pace(clock: Clock, *, until: float, steps: int) -> Callable[[int], int]:
    """The place in a schedule of ``steps`` of a training that begins now and is to end at ``until``."""
    began = clock()

    def pace(_: int) -> int:
        now = clock()
        return steps if now >= until else int(steps * (now - began) / (until - began))

    return pace


def _synthesize(recipe: Recipe, teacher: Teacher, device: torch.device, clock: Clock, *, until: float) -> Job:
    """Make the images that there is time for; returns the job, whose set is closed."""
    job = open_job(recipe, teacher)
    synthesizer = build_synthesizer(recipe, teacher.module, device)
    job.transfer_set.create()
    is_last_piece = _piece_timer(clock, until)
    units: list[WorkUnit] = []
    is_over = False
    with cpu_threads(recipe.synthesis.threads):
        for unit in _endless_plan(recipe):
            is_round = unit.request.classes == recipe.classes
            made, is_over = _make(unit, synthesizer, job.transfer_set, is_last_piece if is_round else lambda: False)
            units.append(made)
            if is_over or (not is_round and unit.request.classes[-1] == recipe.classes[-1] and is_last_piece()):
                break
    images_per_class = sum(unit.request.count for unit in units) // len(recipe.classes)
    transfer_set = recipe.transfer_set.model_copy(update={"images_per_class": images_per_class})
    phase = Phase(units=tuple(units), until_step=recipe.distill.steps)
    job.transfer_set.close(phase.plan)
    return replace(job, phases=(phase,), recipe=recipe.model_copy(update={"transfer_set": transfer_set}))


def _piece_timer(clock: Clock, until: float) -> Callable[[], bool]:
    """A function that says after each piece if it was the last: another as long would end further from ``until``."""
    began = clock()

    def is_last() -> bool:
        nonlocal began
        now = clock()
        took, began = now - began, now
        return now + took / 2 > until

    return is_last


def _make(
    unit: WorkUnit, synthesizer: Synthesizer, transfer_set: TransferSet, is_last_batch: Callable[[], bool]
) -> tuple[WorkUnit, bool]:
    """Commit the images of ``unit`` that there is time for; returns the unit of just those, and whether it is over."""
    sink, request = transfer_set.open(unit), unit.request
    images, is_over, began = 0, False, time.monotonic()
    try:
        for batch in synthesizer.produce(request, lambda _: None):
            sink.write(batch)
            images += len(batch)
            if is_over := is_last_batch():
                break
    except ObjectiveNotFiniteError as error:
        sink.abandon()
        raise RecipeError(f"synthesis: unit {unit.id} came to nothing ({error}); try a lower synthesis.lr") from None
    sink.commit(seconds=time.monotonic() - began)
    return replace(unit, request=replace(request, images_per_class=images // len(request.classes))), is_over


def _endless_plan(recipe: Recipe) -> Iterator[WorkUnit]:
    """The recipe's units and those of ever longer plans, each of which begins with the units of the one before."""
    spec, known = recipe.transfer_set, 0
    for doublings in itertools.count():
        longer = spec.model_copy(update={"images_per_class": spec.unit.images_per_class << doublings})
        units = recipe.model_copy(update={"transfer_set": longer}).plan()
        yield from units[known:]
        known = len(units)
