"""Optimising the pixels of a batch."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from raydfkd.config.schema import BelowOne, Count, Positive, PositiveFloat
from raydfkd.data.batches import SyntheticBatch
from raydfkd.devices import is_out_of_memory
from raydfkd.errors import one_line
from raydfkd.images.augment import Chain, build_augmentations
from raydfkd.networks.build import REFUSALS
from raydfkd.networks.optimizers import warmup_cosine
from raydfkd.seeds import derive_seed, rng_at, rng_from, seeded
from raydfkd.synthesis.canvas import Canvas, Stage
from raydfkd.synthesis.checkpoint import NO_HOOK, StepHook
from raydfkd.synthesis.judge import AskStudent
from raydfkd.synthesis.synthesizer import SYNTHESIZERS, Log, Progress, Setting
from raydfkd.units import Request

logger = logging.getLogger(__name__)
QUIET = 0.1
"""Standard deviation of the noise that images of several octaves start from, in nominal units."""
TERMS_LR = 1e-3
"""Adam's peak learning rate of what terms train; that of pixels is in units of pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Start:
    """The start of one optimisation: N images, those of each of ``groups`` classes together."""

    noise: Tensor
    targets: Tensor | None
    groups: int

    def halves(self) -> tuple[_Start, _Start]:
        """Two starts of half the images: of each class half, or half of the classes where each has one image."""
        images = torch.arange(len(self.noise)).unflatten(0, (self.groups, -1))
        first, second = images.tensor_split(2, dim=1 if images.shape[1] > 1 else 0)
        return self._only(first), self._only(second)

    def _only(self, rows: Tensor) -> _Start:
        targets = None if self.targets is None else self.targets[rows.flatten()]
        return _Start(noise=self.noise[rows.flatten()], targets=targets, groups=len(rows))


@dataclass(slots=True, kw_only=True)
class _Course:
    """How far a unit has come."""

    seed: int
    """Random numbers that networks draw in a step follow from it and the step."""
    noise: list[torch.Generator]
    """Source of the noise that each class's images start from, and of their targets."""
    augmenting: torch.Generator
    before: Tensor
    """State of ``augmenting`` before the first step on ``canvas``."""
    num_begun: int = 0
    """Images of each class that are made or waiting."""
    waiting: list[_Start] = field(default_factory=list)
    """Of the batch in work, last one first."""
    canvas: Canvas | None = None
    """The last of ``waiting``, as far as it is optimised."""
    step: int = 0
    """Steps that were made with it."""
    optimizer: dict[str, Any] | None = None
    """State to go on from."""

    @classmethod
    def begin(cls, request: Request) -> _Course:
        augmenting = rng_from(request.seed)
        noise = [rng_from(seed) for seed in request.class_seeds]
        return cls(seed=request.seed, noise=noise, augmenting=augmenting, before=augmenting.get_state())

    def own_random_numbers(self, purpose: str, device: torch.device) -> AbstractContextManager[None]:
        """For networks that draw global ones (dropout, terms of the user's)."""
        return seeded(derive_seed(self.seed, purpose, self.num_begun, self.step), device)

    def forget_images(self) -> None:
        self.canvas, self.step, self.optimizer = None, 0, None

    def state_dict(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        assert self.canvas is not None, "there is something to optimise"
        return {
            "noise": [rng.get_state() for rng in self.noise],
            "augmenting": self.augmenting.get_state(),
            "num_begun": self.num_begun,
            "waiting": [(start.noise, start.targets, start.groups) for start in self.waiting],
            "octaves": [octave.detach().cpu().clone() for octave in self.canvas.octaves],
            "step": self.step,
            "before": self.before,
            "optimizer": optimizer.state_dict(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], seed: int, device: torch.device) -> _Course:
        waiting = [_Start(noise=noise, targets=targets, groups=groups) for noise, targets, groups in state["waiting"]]
        octaves = state["octaves"] if "octaves" in state else [state["images"]]  # of versions that had one only
        return cls(
            seed=seed,
            noise=[rng_at(position) for position in state["noise"]],
            augmenting=rng_at(state["augmenting"]),
            num_begun=state["num_begun"],
            waiting=waiting,
            canvas=Canvas([octave.to(device) for octave in octaves]),
            step=state["step"],
            before=state["before"],
            optimizer=state["optimizer"],
        )


@SYNTHESIZERS.register("pixels")
class PixelSynthesizer:
    """Optimises a batch of images from noise, in stages of growing resolution; the last iterate is kept.

    The noise is Gaussian around mid-grey, of 0.225 of the range from black to white: unit noise in nominal units (see
    ``images.pixels``), in which pixels are optimised whatever the teacher takes, so that every image space is treated
    as one normalised for ImageNet.

    With `synthesis.start` real pictures stand in the place of the noise, drawn for each class without regard to what is
    on them.

    Each stage has a fresh Adam, a warm-up and a cosine to zero. Augmentations apply to what the teacher sees; the
    terms judge that view. Source: Yin et al. 2020, settings 0 and 1 of the released code; unlike there, "best"
    iterates are not kept, because losses of different steps are of different views.

    A batch that the device has no memory for is halved until it fits; moments are then matched over each half.

    Args:
        batch_size: images optimised together at most, equally many of each class; a unit's are shared out evenly.
        stages: steps and pooling of each stage, in order.
        lr: Adam's peak learning rate in nominal units, of which black and white are 4.44 apart: 0.1 is 5.7 grey levels.
        betas: Adam's.
        warmup: steps of linear warm-up in each stage.
        clip: keep pixels within black and white after each step.
        octaves: images are the sum of so many layers, each of half the resolution of the one before, all of which are
            optimised; a stage leaves out those that are finer than what it sees. With more than one the noise is a
            tenth, and pictures have large forms and little noise.
    """

    starts_from_pictures = True

    def __init__(
        self,
        setting: Setting,
        *,
        batch_size: Positive,
        stages: tuple[Stage, ...],
        lr: PositiveFloat = 0.1,
        betas: tuple[BelowOne, BelowOne] = (0.5, 0.9),
        warmup: Count = 20,
        clip: bool = True,
        octaves: Positive = 1,
    ) -> None:
        edges = (setting.space.height, setting.space.width)
        if (most := min(edges).bit_length()) < octaves:
            raise ValueError(
                f"octaves is {octaves}, but image size {setting.space.size_text} has only {most}; use fewer"
            )
        for stage in stages:
            if any(edge % stage.pool for edge in edges):
                fewer = [pool for pool in range(1, stage.pool) if not any(edge % pool for edge in edges)]
                raise ValueError(
                    f"stages: pool is {stage.pool}, which does not divide image size {setting.space.size_text}; "
                    f"use {fewer[-1]}"
                )
            _try_networks(setting, stage)
        self._setting = setting
        self._batch_size = batch_size
        self._too_many = math.inf
        self._stages = stages
        self._augment = [self._augment_of(stage, f"synthesis.stages[{at}].augment") for at, stage in enumerate(stages)]
        self._steps = sum(stage.steps for stage in stages)
        self._lr, self._betas, self._warmup = lr, betas, warmup
        self._clip = clip
        self._octaves = octaves

    def _augment_of(self, stage: Stage, where: str) -> Chain:
        if stage.augment is None:
            return self._setting.augment
        objective = self._setting.judge.objective
        return build_augmentations(
            stage.augment,
            where=where,
            label_reader=objective.label_reader(takes_mixed=False),
            mixed_label_reader=objective.label_reader(takes_mixed=True),
        )

    def produce(self, request: Request, log: Log, hook: StepHook = NO_HOOK) -> Iterator[SyntheticBatch]:
        """Stream batches that together hold ``request.images_per_class`` images of each class."""
        saved = hook.resumed()
        device, objective = self._setting.device, self._setting.judge.objective
        objective.begin()
        course = _Course.begin(request)
        if saved is not None:
            course = _Course.from_state(saved, request.seed, device)
            objective.resume(saved["terms"], device)
        # Batches that are begun stand on a stack, so that one that does not fit into memory is replaced by its halves.
        # A course is all that there is of a unit between two steps: what is done, what waits, and every generator of
        # random numbers.
        while course.waiting or course.num_begun < request.images_per_class:
            if not course.waiting:
                course.waiting.append(self._next_batch(request, course))
            made = self._try_to_invert(course, log, hook)
            if made is not None:
                course.waiting.pop()
                yield made

    def num_steps(self, request: Request) -> int:
        """Steps of all stages for each batch."""
        per_batch = max(1, self._batch_size // len(request.classes))
        return math.ceil(request.images_per_class / per_batch) * sum(stage.steps for stage in self._stages)

    def _next_batch(self, request: Request, course: _Course) -> _Start:
        per_batch = max(1, self._batch_size // len(request.classes))
        left = request.images_per_class - course.num_begun
        # Shared out evenly: moments of a last batch that is a small rest would be matched over a few images.
        count = math.ceil(left / math.ceil(left / per_batch))
        course.num_begun += count
        images = torch.cat([self._draw_start(count, rng) for rng in course.noise])
        targets = self._setting.targets(request.classes, count, course.noise)
        return _Start(noise=images, targets=targets, groups=len(request.classes))

    def _draw_start(self, count: int, rng: torch.Generator) -> Tensor:
        """What ``count`` images of a class start from, nominal."""
        if self._setting.start is not None:
            return self._setting.start.draw(count, rng)
        noise = torch.randn(count, *self._setting.space.shape, generator=rng)
        return noise if self._octaves == 1 else QUIET * noise

    def _try_to_invert(self, course: _Course, log: Log, hook: StepHook) -> SyntheticBatch | None:
        """Make the last of ``waiting`` into images; None, with its halves in its place, where there is no memory."""
        start = course.waiting[-1]
        count = len(start.noise)
        if count < self._too_many:
            if not course.step:
                course.before = course.augmenting.get_state()
            try:
                return self._invert(course, log, hook)
            except (RuntimeError, MemoryError) as error:
                if count == 1 or not is_out_of_memory(error):
                    raise
            if self._setting.device.type == "cuda":
                torch.cuda.empty_cache()
            course.augmenting.set_state(course.before)
            logger.warning("no memory for a batch of %d images; going on with half as many", count)
            self._too_many = count
        course.forget_images()
        course.waiting[-1:] = reversed(start.halves())
        return None

    def _invert(self, course: _Course, log: Log, hook: StepHook) -> SyntheticBatch:
        start, device = course.waiting[-1], self._setting.device
        if course.canvas is None:
            course.canvas = Canvas.begin(start.noise.to(device), self._octaves)
        targets = None if start.targets is None else start.targets.to(device)
        total = torch.zeros(())
        first = 0
        for stage, augment in zip(self._stages, self._augment, strict=True):
            if course.step < first + stage.steps:
                total = self._run(stage, augment, first, course, targets, log, hook)
            first += stage.steps
        with course.own_random_numbers("keep", device):
            kept = self._setting.judge.keep(course.canvas.images(self._stages[-1]), targets, total.item())
        course.forget_images()
        return kept

    def _state_dict(self, course: _Course, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return course.state_dict(optimizer) | {"terms": self._setting.judge.objective.state_dict()}

    def _run(
        self,
        stage: Stage,
        augment: Chain,
        first: int,
        course: _Course,
        targets: Tensor | None,
        log: Log,
        hook: StepHook,
    ) -> Tensor:
        """The steps of ``stage`` that are left, where ``first`` come before it; returns the objective at the last."""
        judge, device = self._setting.judge, self._setting.device
        canvas, groups = course.canvas, course.waiting[-1].groups
        assert canvas is not None, "there is something to optimise"
        groups_of_parameters = [
            {"params": canvas.within(stage), "lr": self._lr},
            *judge.objective.parameter_groups(lr=TERMS_LR),
        ]
        optimizer = torch.optim.Adam(groups_of_parameters, betas=self._betas, fused=True)
        peaks = [group["lr"] for group in optimizer.param_groups]
        if course.step > first:
            assert course.optimizer is not None, "a state within a stage has the stage's optimiser"
            optimizer.load_state_dict(course.optimizer)
        report = Progress(log, steps=first + stage.steps)
        total = torch.zeros(())
        for step in range(course.step - first, stage.steps):
            hook(partial(self._state_dict, course, optimizer))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * warmup_cosine(step, steps=stage.steps, warmup=self._warmup)
            seen = canvas.seen(stage)
            progress = course.step / self._steps
            with course.own_random_numbers("step", device):
                view, wanted = self._setting.seen(seen, targets, course.augmenting, augment=augment, progress=progress)
                _, value = judge(view, wanted, groups=groups, progress=progress)
                optimizer.zero_grad()
                # Terms are means over images; the sum over classes keeps a class's gradient free of its neighbours.
                (value.total * groups).backward()
            optimizer.step()
            if self._clip:
                canvas.clip(stage)
            course.step += 1
            report(course.step, value)
            total = value.total
        return total


def _try_networks(setting: Setting, stage: Stage) -> None:
    """Refuse a size at which the teacher, or the student where terms ask it, cannot take the images."""
    channels = setting.space.channels
    height, width = stage.edges((setting.space.height, setting.space.width))
    blank = torch.zeros(2, channels, height, width, device=setting.device)
    asked: dict[str, AskStudent] = {"teacher": setting.judge.teacher}
    student = setting.judge.asked()
    if student is not None:
        asked["student"] = student
    given, remedy = (
        (f"pool is {stage.pool}", "use pool 1") if stage.size is None else (f"size is {stage.size}", "drop it")
    )
    for role, ask in asked.items():
        try:
            with torch.no_grad():
                ask(blank)
        except REFUSALS as error:
            raise ValueError(
                f"stages: {given}, but the {role} cannot take {height}x{width} pixels ({one_line(error)}); {remedy}"
            ) from None
