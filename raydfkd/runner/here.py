"""How long a recipe's work takes on this machine, by the time of some steps of it."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from raydfkd.config.recipe import Recipe
from raydfkd.data.sources import StudentBatch
from raydfkd.devices import cpu_threads, keep_freed_memory, pick_device
from raydfkd.networks.teacher import build_teacher
from raydfkd.runner.trials import (
    MANY_STEPS,
    Batch,
    Part,
    noise_batches,
    parts_of,
    request_for,
    synthesizer_of,
    trainer_of,
)
from raydfkd.synthesis.checkpoint import NoHook
from raydfkd.synthesis.synthesizer import Synthesizer
from raydfkd.units import Request

Clock = Callable[[], float]
"""Tells seconds since some moment."""
STEPS = 4
"""Steps of each stage in a run of a trial."""
MOST_BATCHES = 2
"""Batches of a run that are made by one stage."""
FEW = 4
"""Classes, and images of each, of a batch on a CPU that would take too long for the whole one: there, seconds are in
proportion to images."""
STUDENT_SHARE = 0.25
"""Share of the time that goes to the student's steps."""
STUDENT_STEPS = 3
"""Fewest steps of the student that are timed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """What a recipe's work takes on this machine."""

    device: torch.device
    unit_s: float
    """Seconds of a worker for a unit, without those for storing it."""
    student_step_s: float
    """Seconds of a train worker for a step with its share of the images."""

    @property
    def memory_gib(self) -> float:
        """Memory of the device."""
        if self.device.type == "cuda":
            return float(torch.cuda.get_device_properties(self.device).total_memory) / 2**30
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def time_here(recipe: Recipe, seconds: float, *, clock: Clock = time.perf_counter) -> Here:
    """Make steps of a recipe's synthesis and of its student for about so many seconds; weights need not be there.

    Each kind of step is made a few times, however long it takes.

    Args:
        recipe: what is to be run.
        seconds: for all of it.
        clock: on a machine that does other work too, ``time.process_time`` counts the seconds of this process.

    Raises:
        RecipeError: the recipe is wrong, or its device is not there.
    """
    device = pick_device(recipe.runtime.device)
    if device.type == "cpu":
        keep_freed_memory()
    trials, parts = _Trials(build_teacher(recipe), device, clock), parts_of(recipe)
    with cpu_threads(recipe.synthesis.threads):
        unit_s = sum(trials.unit_s(part, (1 - STUDENT_SHARE) * seconds / len(parts)) for part in parts)
    with cpu_threads(recipe.distill.threads):
        student_step_s = trials.student_step_s(recipe, STUDENT_SHARE * seconds)
    return Here(device=device, unit_s=unit_s, student_step_s=student_step_s)


class _Laps(NoHook):
    """Notes the time before each step of a run, from its beginning to its end."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._start = self._end = clock()
        self._times: list[float] = []
        self._with_images: set[int] = set()

    @override
    def __call__(self, state: Callable[[], Mapping[str, Any]]) -> None:
        self._times.append(self._clock())

    def note_images(self) -> None:
        """Images have come since the last step began."""
        self._with_images.add(len(self._times) - 1)

    def end(self) -> None:
        """The run is over."""
        self._end = self._clock()

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self._end - self._start

    def of_steps(self, first: int, end: int) -> list[float]:
        """Seconds from each of those steps to the next, without those that images came in unless they came in all."""
        laps = [after - before for before, after in itertools.pairwise([*self._times, self._end])]
        bare = [laps[number] for number in range(first, end) if number not in self._with_images]
        return bare or laps[first:end]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pace:
    """Seconds of a part's work."""

    steps: Sequence[float]
    """Of a step in each stage."""
    beside: float
    """Beside the steps, for each batch."""
    run: float
    """Of a whole run of the trial."""


class _Trials:
    """Trials on one device.

    Args:
        teacher: with any weights.
        device: to work on.
        clock: to look at.
    """

    def __init__(self, teacher: nn.Module, device: torch.device, clock: Clock) -> None:
        self._teacher, self._device, self._clock = teacher, device, clock

    def unit_s(self, part: Part, seconds: float) -> float:
        """Seconds that a part takes for its images of a unit, from trials of about so many seconds."""
        whole = part.batch
        few = whole.at_most(FEW, FEW)
        scale = whole.images / few.images
        if self._can_scale and scale > 1 and 3 * scale * self._pace(part, few, 0).run > seconds:
            return scale * _seconds(part, self._pace(part, few, seconds))
        return _seconds(part, self._pace(part, whole, seconds))

    def student_step_s(self, recipe: Recipe, seconds: float) -> float:
        """Seconds of a step of the student, from trials of about so many seconds."""
        whole = max(1, recipe.distill.batch_size // recipe.runtime.student_workers.max)
        few = min(whole, FEW * FEW)
        scale = whole / few
        if self._can_scale and scale > 1 and STUDENT_STEPS * scale * self._student_step(recipe, few, 0) > seconds:
            return scale * self._student_step(recipe, few, seconds)
        return self._student_step(recipe, whole, seconds)

    @property
    def _can_scale(self) -> bool:
        return self._device.type == "cpu"

    def _pace(self, part: Part, batch: Batch, seconds: float) -> _Pace:
        """The pace of runs of a trial, the first of which does not count: it compiles, and finds nothing cached."""
        small = part.trial(batch, steps=STEPS)
        batches = 1 if len(part.steps_of(1)) > 1 else min(MOST_BATCHES, part.batches)
        counts = small.steps_of(batches)
        synthesizer = synthesizer_of(small.recipe, self._teacher, self._device)
        request = request_for(small.recipe, batch, batches=batches)
        self._run(synthesizer, request)
        until, runs = self._now() + seconds, [self._run(synthesizer, request)]
        while self._now() < until:
            runs.append(self._run(synthesizer, request))
        ends = list(itertools.accumulate(counts, initial=0))
        steps = [
            statistics.fmean(lap for run in runs for lap in run.of_steps(first, end))
            for first, end in itertools.pairwise(ends)
        ]
        in_steps = sum(count * each for count, each in zip(counts, steps, strict=True))
        whole = statistics.fmean(run.seconds for run in runs)
        return _Pace(steps=steps, beside=max(0.0, whole - in_steps) / batches, run=whole)

    def _run(self, synthesizer: Synthesizer, request: Request) -> _Laps:
        laps = _Laps(self._now)
        for _ in synthesizer.produce(request, lambda _: None, laps):
            laps.note_images()
        laps.end()
        return laps

    def _student_step(self, recipe: Recipe, images: int, seconds: float) -> float:
        times: list[float] = []
        batches = noise_batches(recipe, images)

        def until_time_is_up() -> Iterator[StudentBatch]:
            for batch in batches:
                times.append(self._now())
                if len(times) > STUDENT_STEPS + 1 and times[-1] - times[1] > seconds:
                    return
                yield batch

        trainer_of(recipe, self._teacher, self._device).fit(until_time_is_up(), steps=MANY_STEPS)
        return statistics.fmean(after - before for before, after in itertools.pairwise(times[1:]))

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()


def _seconds(part: Part, pace: _Pace) -> float:
    """Seconds that a part takes for a unit."""
    steps = part.steps_of(part.batches)
    return sum(count * each for count, each in zip(steps, pace.steps, strict=True)) + pace.beside * part.batches
