"""The best student for a number of device-seconds: both synthesis and training end by the clock."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from raydfkd.config.recipe import Recipe
from raydfkd.data.student_versions import State
from raydfkd.data.transfer_set import TransferSet
from raydfkd.devices import cpu_threads, keep_freed_memory, pick_device
from raydfkd.distillation.trainer import TrainingHooks, ignore
from raydfkd.distillation.training import StudentTraining
from raydfkd.errors import RecipeError
from raydfkd.job import Job, open_job
from raydfkd.networks.teacher import Teacher, open_teacher
from raydfkd.runner.estimate import judge_of
from raydfkd.runner.run import save_student
from raydfkd.synthesis.build import build_student, build_synthesizer, generator_maker, is_live
from raydfkd.synthesis.judge import ObjectiveNotFiniteError
from raydfkd.synthesis.setting import build_setting
from raydfkd.synthesis.student_feed import StoredStudentFeed
from raydfkd.synthesis.synthesizer import Setting, Synthesizer
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


MakeSynthesizer = Callable[[Setting], Synthesizer]
"""Makes a synthesizer that takes the place of a recipe's own."""


def run_within(recipe: Recipe, seconds: float, *, synthesizer: MakeSynthesizer | None = None) -> Outcome:
    """Synthesize in this process for the recipe's ``synthesis_share`` of ``seconds``, distil for the rest.

    With rounds both share out their time evenly among them, and each but the first synthesizes against the student of
    the round before. A live source has all of the time, since its generator is trained between the student's steps.

    The set of a round ends with the piece whose end is nearest to its share; a piece is a batch where a unit holds all
    classes, so that units are cut short, else a round of units. The learning rate follows the clock, so that its
    schedule ends when the time is over, however fast the steps are. At least one piece and one step are made in each
    round, however short the budget.

    Args:
        recipe: what is run; the number of its images and of its steps do not count.
        seconds: device-seconds, start of the networks included.
        synthesizer: makes one that stands in for the recipe's own; for control arms.

    Raises:
        RecipeError: a unit comes to nothing, or the student is asked before it is trained.
    """
    device = pick_device(recipe.runtime.device)
    if device.type == "cpu":
        keep_freed_memory()
    clock, began_at = device_clock(device), time.monotonic()
    began = clock()
    teacher = open_teacher(recipe)
    rounds = _Rounds(open_job(recipe, teacher), teacher, device, clock, synthesizer)
    state = rounds.run(until=began + seconds)
    steps = rounds.steps
    distill = recipe.distill.model_copy(update={"steps": steps})
    job = replace(rounds.job, recipe=rounds.job.recipe.model_copy(update={"distill": distill}))
    student = save_student(job, state)
    return Outcome(
        recipe=job.recipe,
        student=student,
        images=job.planned_images or steps * distill.batch_size,
        student_steps=steps,
        synthesis_seconds=rounds.synthesis_seconds,
        seconds=clock() - began,
        wall_seconds=time.monotonic() - began_at,
    )


class _Rounds:
    """Synthesis and training in turn, by the clock; a single round of each where the recipe has no more."""

    def __init__(
        self, job: Job, teacher: Teacher, device: torch.device, clock: Clock, synthesizer: MakeSynthesizer | None
    ) -> None:
        self.job = job
        """The job as far as it has come: its last phase has the units that were made."""
        self.synthesis_seconds = 0.0
        """Device-seconds of all syntheses; those of a live source are part of the training."""
        self.steps = 0
        """Steps that the student has made."""
        self._teacher, self._device, self._clock = teacher, device, clock
        self._plan = _endless_plan(job.recipe)
        self._units: tuple[WorkUnit, ...] = ()
        self._student = _StudentOfBefore()
        self._pieces = _Pieces(clock)
        self._feed: StoredStudentFeed | None = None
        self._synthesizer: Synthesizer | None = None
        if synthesizer is not None:
            self._synthesizer = synthesizer(build_setting(job.recipe, teacher.module, device))
        elif not is_live(job.recipe):
            self._feed = build_student(_in_one_process(job.recipe), teacher.module, self._student, device)
            if self._feed is not None:
                self._feed.follow(None)
            self._synthesizer = build_synthesizer(job.recipe, teacher.module, device, self._feed)
        job.transfer_set.create()

    def run(self, *, until: float) -> Mapping[str, Tensor]:
        """Make all rounds, the last of which ends at ``until``; returns the student's weights."""
        recipe = self.job.recipe
        rounds = recipe.rounds
        training, state = None, None
        for number in range(rounds):
            now = self._clock()
            left = (until - now) / (rounds - number)
            if self._synthesizer is not None:
                self._synthesize(self._synthesizer, until=now + left * recipe.budget.synthesis_share)
            self.synthesis_seconds += self._clock() - now if self._synthesizer is not None else 0.0
            training, state = self._train(training, number, until=now + left, is_last=number == rounds - 1)
        assert state is not None, "there is at least one round"
        return state

    def _train(
        self, before: StudentTraining | None, number: int, *, until: float, is_last: bool
    ) -> tuple[StudentTraining, Mapping[str, Tensor]]:
        """Train in round ``number`` from where the round before ended, along that part of the schedule."""
        recipe = self.job.recipe
        ends = [recipe.distill.steps * (done + 1) // recipe.rounds for done in range(recipe.rounds)]
        phases = tuple(Phase(units=self._units, until_step=end) for end in ends)
        self.job = replace(self.job, phases=phases)
        training = StudentTraining(
            self.job,
            self._teacher,
            phases[number],
            hooks=TrainingHooks(on_log=ignore),
            generator=generator_maker(recipe, self._teacher.module),
            judge=judge_of(recipe, self._teacher.module),
        )
        if before is not None:
            training.load_state_dict(before.state_dict())
        now = self._clock()
        margin = MARGIN if is_last else 0.0
        start = ends[number - 1] if number else 0
        pace = _pace(self._clock, until=now + (until - now) * (1 - margin), start=start, end=ends[number])
        state = training.run(pace=pace)
        self.steps = training.trainer.step
        if self._feed is not None:
            self._student.take(self.steps, state)
            self._feed.follow(self._student)
            self._feed.refresh()
        return training, state

    def _synthesize(self, synthesizer: Synthesizer, *, until: float) -> None:
        """Make the images that there is time for, at least a piece, and close the set for those that there are."""
        recipe, transfer_set = self.job.recipe, self.job.transfer_set
        pieces = self._pieces
        pieces.begin_round()
        with cpu_threads(recipe.synthesis.threads):
            for unit in self._plan:
                is_round = unit.request.classes == recipe.classes
                if is_round:
                    pieces.begin_unit()
                is_last = partial(pieces.end, until) if is_round else _never
                made, is_over = _make(unit, synthesizer, transfer_set, is_last)
                self._units += (made,)
                ends_round = not is_round and unit.request.classes[-1] == recipe.classes[-1]
                if is_over or (ends_round and pieces.end(until)):
                    break
        images_per_class = sum(unit.request.count for unit in self._units) // len(recipe.classes)
        spec = recipe.transfer_set.model_copy(update={"images_per_class": images_per_class})
        self.job = replace(self.job, recipe=recipe.model_copy(update={"transfer_set": spec}))
        transfer_set.close(Phase(units=self._units, until_step=recipe.distill.steps).plan)


def _in_one_process(recipe: Recipe) -> Recipe:
    """The recipe as this process runs it, where nobody trains the student beside the synthesis."""
    return recipe.model_copy(update={"runtime": recipe.runtime.model_copy(update={"executor": "local"})})


class _StudentOfBefore:
    """The student that the round before has trained, as a source of versions."""

    def __init__(self) -> None:
        self._newest: tuple[int, State] | None = None

    def take(self, version: int, state: State) -> None:
        """Hold a copy of ``state``."""
        self._newest = (version, {name: tensor.detach().clone() for name, tensor in state.items()})

    def __call__(self, than: int) -> tuple[int, State] | None:
        """The newest version, where it is newer than ``than``."""
        return self._newest if self._newest is not None and self._newest[0] > than else None


def _pace(clock: Clock, *, until: float, start: int, end: int) -> Callable[[int], int]:
    """The place in a schedule, from ``start`` to ``end``, of a training that begins now and is to end at ``until``."""
    began = clock()

    def pace(_: int) -> int:
        now = clock()
        return end if now >= until else start + int((end - start) * (now - began) / (until - began))

    return pace


class _Pieces:
    """Says after each piece of a unit if it was the last: the next one would end further from where it should.

    Pieces of a unit differ, where some images are drawn and others optimised, but those at one place in it are alike.
    So the next one is expected to take what that at its place last took; where there was none yet, what this one took.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._took: list[float] = []
        self._place, self._began = 0, 0.0

    def begin_round(self) -> None:
        """A synthesis begins."""
        self._began = self._clock()

    def begin_unit(self) -> None:
        """The next piece is the first one of a unit."""
        self._place = 0

    def end(self, until: float) -> bool:
        """A piece ends; returns whether it was the last that is near enough to ``until``."""
        now = self._clock()
        self._took[self._place : self._place + 1] = [now - self._began]
        self._place, self._began = self._place + 1, now
        expected = self._took[self._place] if self._place < len(self._took) else self._took[self._place - 1]
        return now + expected / 2 > until


def _never() -> bool:
    return False


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
