"""How fast a recipe is on this machine, and the images and steps that a budget has room for."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from raydfkd.config.recipe import Recipe
from raydfkd.config.schema import Precision
from raydfkd.devices import cpu_threads, dtype_of, keep_freed_memory, pick_device
from raydfkd.errors import RecipeError
from raydfkd.images.pixels import PixelRange
from raydfkd.networks.build import build_network
from raydfkd.networks.observed import ObservedNetwork
from raydfkd.networks.teacher import open_teacher
from raydfkd.synthesis.build import build_student, build_synthesizer

RAY_SECONDS, LOCAL_SECONDS = 40.0, 5.0
"""What a run spends beside its work: on a cluster of its own, in this process."""
SHORT = 300.0
"""Budgets up to which everything is done in one process, without the start of a cluster."""
SYNTHESIS_SHARE = 0.5
STUDENT_SHARE = 0.75
"""Of the time that the student has beside synthesis, which it begins after."""
PIECES = 8
"""Units of each class that a budget should have room for, so that little is lost with a machine."""
TRIAL_STEPS = 2
PRECISIONS: tuple[Precision, Precision] = ("float32", "bfloat16")
MARGIN = 1.2
"""How many times faster bfloat16 has to be."""
MOST_TIMES, ENOUGH_SECONDS = 5, 2.0
"""How often a step is timed, and in how many seconds at most another time begins."""
FEWEST_STEPS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What a step takes on this machine."""

    synthesis: float
    """Seconds of a step of synthesis with one batch."""
    student: float
    """Seconds of a step of the student, the teacher's answer included."""
    first_batch: int
    """Steps before the first batch of a unit."""
    next_batch: int
    """Steps before every other one."""
    device: torch.device
    peak_mib: int
    """Most memory that this process has used, in MiB."""
    beside: float = 0.0
    """Seconds that the images of other synthesizers take that belong to a batch."""

    def unit_seconds(self, batches: int) -> float:
        """Seconds that a worker needs for a unit of so many batches."""
        return self.synthesis * (self.first_batch + self.next_batch * (batches - 1)) + self.beside * batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """In what the networks compute."""

    synthesis: Precision = "float32"
    student: Precision = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Numbers of a recipe that follow from its budget."""

    batches_per_unit: int
    units_per_class: int
    student_steps: int
    workers: int
    executor: str
    rounds: int = 1
    """Each but the first against the student of the one before; share out the units evenly."""


def fastest(page: Callable[[Arithmetic], Recipe]) -> tuple[Arithmetic, Speed]:
    """Measure a recipe in float32 and bfloat16; the latter where it is faster by a margin that noise has not.

    Args:
        page: the recipe that computes in a certain way.

    Raises:
        RecipeError: the recipe is wrong.
    """
    exact, short = (measure(page(Arithmetic(synthesis=one, student=one))) for one in PRECISIONS)
    arithmetic = Arithmetic(
        synthesis=PRECISIONS[exact.synthesis > MARGIN * short.synthesis],
        student=PRECISIONS[exact.student > MARGIN * short.student],
    )
    made = exact if arithmetic.synthesis == "float32" else short
    return arithmetic, replace(made, student=min(exact.student, short.student))


def measure(whole: Recipe) -> Speed:
    """Make a few steps of a recipe: of its synthesis with one batch, and of its student.

    Raises:
        RecipeError: the recipe is wrong.
    """
    synthesis = whole.synthesis.model_dump(mode="json")
    if "stages" in synthesis:
        first = following = sum(stage["steps"] for stage in synthesis["stages"])
        synthesis["stages"] = [{"steps": TRIAL_STEPS}]
    else:
        first, following = synthesis["steps"], synthesis["renewal"]["steps"]
        synthesis |= {"steps": TRIAL_STEPS, "renewal": {**synthesis["renewal"], "steps": TRIAL_STEPS}}
    recipe = whole.with_synthesis(synthesis)
    alone = whole.with_synthesis({**synthesis, "beside": []})
    device = pick_device(recipe.runtime.device)
    if device.type == "cpu":
        keep_freed_memory()
    teacher = open_teacher(recipe).module
    with cpu_threads(recipe.synthesis.threads):
        synthesis_seconds = _synthesis_seconds(alone, teacher, device)
        whole_seconds = _synthesis_seconds(recipe, teacher, device) if whole.synthesis.beside else synthesis_seconds
        student_seconds = _student_seconds(recipe, teacher.to(device), device)
    return Speed(
        synthesis=synthesis_seconds / TRIAL_STEPS,
        student=student_seconds,
        first_batch=first,
        next_batch=following,
        device=device,
        peak_mib=peak_mib(device),
        beside=max(0.0, whole_seconds - synthesis_seconds),
    )


def _synthesis_seconds(recipe: Recipe, teacher: nn.Module, device: torch.device) -> float:
    student = build_student(recipe, teacher, lambda _: None, device)
    synthesizer, request = build_synthesizer(recipe, teacher, device, student), recipe.plan()[0].request
    return _second_time(lambda: sum(len(batch) for batch in synthesizer.produce(request, lambda _: None)), device)


def _student_seconds(recipe: Recipe, teacher: nn.Module, device: torch.device) -> float:
    student = build_network(recipe.student, recipe.teacher, where="student", seed=0).to(device).train()
    space, count = recipe.teacher.image_space, recipe.distill.batch_size
    stored = torch.randint(256, (count, *space.shape), dtype=torch.uint8, device=device)
    images = PixelRange(space, device).from_uint8(stored)
    precision = dtype_of(recipe.distill.precision, device)
    learner = ObservedNetwork(student, frozen=False, precision=precision).to(device)
    asked = ObservedNetwork(teacher, frozen=True, precision=precision).to(device)

    def step() -> None:
        F.l1_loss(learner(images).logits, asked(images).logits).backward()

    return _second_time(step, device)


def _second_time(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of ``work`` once it was done before: the least of some, since what else runs here only adds to it."""
    work()
    times: list[float] = []
    while len(times) < MOST_TIMES and sum(times) < ENOUGH_SECONDS:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def peak_mib(device: torch.device) -> int:
    """Most memory that this process has used on a device, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def sizes_for(budget: float, speed: Speed, *, groups: int, rounds: int = 1, by_clock: bool = False) -> Sizes:
    """Divide a budget of seconds: half for images, the rest for the student, who learns meanwhile on a cluster.

    Args:
        budget: seconds on this machine.
        speed: of the recipe.
        groups: units that hold all classes once.
        rounds: that there should be; fewer where there is no room for a unit of each class in all of them.
        by_clock: whether the run, of one process, ends with its budget whatever it has made; none is too short.

    Raises:
        RecipeError: it has no room for a unit of each class.
    """
    places = torch.cuda.device_count() if speed.device.type == "cuda" else _cores()
    is_cluster = budget > SHORT and places > 1 and not by_clock
    workers = places - 1 if is_cluster else 1
    beside = RAY_SECONDS if is_cluster else LOCAL_SECONDS
    for_images = SYNTHESIS_SHARE * (budget - beside) * workers
    units, fewest = int(for_images / (groups * speed.unit_seconds(1))), min(rounds, 2)
    if units < fewest and not by_clock:
        least = groups * speed.unit_seconds(1) / workers
        raise RecipeError(
            f"--budget is {in_words(budget)}, but a unit of each class takes {in_words(least)} here"
            f"{f', and {fewest} of them are needed' if fewest > 1 else ''}; give at least "
            f"{in_words(1.05 * fewest * least / SYNTHESIS_SHARE + beside)}"
        )
    batches, pieces = 1, max(PIECES, 2 * rounds)
    while groups * pieces * speed.unit_seconds(batches + 1) <= for_images:
        batches += 1
    units = max(fewest, int(for_images / (groups * speed.unit_seconds(batches))))
    rounds = min(rounds, units)
    share = STUDENT_SHARE if is_cluster else 1 - SYNTHESIS_SHARE
    return Sizes(
        batches_per_unit=batches,
        units_per_class=units - units % rounds,
        student_steps=max(FEWEST_STEPS, int(share * (budget - beside) / speed.student)),
        workers=workers,
        executor="ray" if is_cluster else "local",
        rounds=rounds,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_words(seconds: float) -> str:
    """A number of seconds as people say it."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
