"""Optimising the pixels of a batch."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from raydfkd.batches import SyntheticBatch
from raydfkd.memory import is_out_of_memory
from raydfkd.recipe import BelowOne, Count, Positive, PositiveFloat, Spec
from raydfkd.schedule import Request
from raydfkd.synthesis.synthesizer import SYNTHESIZERS, Log, Progress, Setting, rng_from, warmup_cosine

logger = logging.getLogger(__name__)


class Stage(Spec):
    """Part of an optimisation at one resolution."""

    steps: Positive
    """Optimiser steps."""
    pool: Positive = 1
    """Edge of the squares of pixels that are averaged before the teacher looks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Start:
    """What one optimisation begins with: N images, those of each of ``groups`` classes together."""

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


@SYNTHESIZERS.register("pixels")
class PixelSynthesizer:
    """Optimises a batch of images from noise, in stages of growing resolution; the last iterate is kept.

    Each stage has a fresh Adam, a warm-up and a cosine to zero. Augmentations apply to what the teacher sees; the
    terms judge that view. Source: Yin et al. 2020, settings 0 and 1 of the released code; unlike there, "best"
    iterates are not kept, because losses of different steps are of different views.

    A batch that the device has no memory for is halved until it fits; moments are then matched over each half.

    Args:
        batch_size: images optimised together, equally many of each class of the unit.
        stages: steps and pooling of each stage, in order.
        lr: Adam's peak learning rate, in normalised pixel units.
        betas: Adam's.
        warmup: steps of linear warm-up in each stage.
        clip: keep pixels within black and white after each step.
    """

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
    ) -> None:
        for stage in stages:
            if setting.space.size % stage.pool:
                raise ValueError(f"stages: pool is {stage.pool}, which does not divide image size {setting.space.size}")
            _try_teacher(setting, stage.pool)
        self._setting = setting
        self._batch_size = batch_size
        self._too_many = math.inf
        self._stages = stages
        self._lr, self._betas, self._warmup = lr, betas, warmup
        self._clip = clip

    def produce(self, request: Request, log: Log) -> Iterator[SyntheticBatch]:
        """Stream batches that together hold ``request.images_per_class`` images of each class."""
        per_batch = max(1, self._batch_size // len(request.classes))
        noise = [rng_from(seed) for seed in request.class_seeds]
        augmenting = rng_from(request.seed)
        for start in range(0, request.images_per_class, per_batch):
            count = min(per_batch, request.images_per_class - start)
            shape = (count, *self._setting.space.shape)
            images = torch.cat([torch.randn(shape, generator=rng) for rng in noise])
            targets = self._setting.targets(request.classes, count)
            batch = _Start(noise=images, targets=targets, groups=len(request.classes))
            yield from self._invert_in_parts(batch, augmenting, log)

    def _invert_in_parts(self, start: _Start, rng: torch.Generator, log: Log) -> Iterator[SyntheticBatch]:
        made = self._try_to_invert(start, rng, log)
        if made is not None:
            yield made
            return
        for half in start.halves():
            yield from self._invert_in_parts(half, rng, log)

    def _try_to_invert(self, start: _Start, rng: torch.Generator, log: Log) -> SyntheticBatch | None:
        """The batch that ``start`` becomes; None, with ``rng`` as it was, where memory does not suffice for it."""
        count = len(start.noise)
        if count >= self._too_many:
            return None
        state = rng.get_state()
        try:
            return self._invert(start, rng, log)
        except (RuntimeError, MemoryError) as error:
            if count == 1 or not is_out_of_memory(error):
                raise
        if self._setting.device.type == "cuda":
            torch.cuda.empty_cache()
        rng.set_state(state)
        logger.warning("no memory for a batch of %d images; going on with half as many", count)
        self._too_many = count
        return None

    def _invert(self, start: _Start, rng: torch.Generator, log: Log) -> SyntheticBatch:
        device, judge, groups = self._setting.device, self._setting.judge, start.groups
        images = start.noise.to(device, copy=True).requires_grad_()
        targets = None if start.targets is None else start.targets.to(device)
        low, high = judge.pixels.bounds
        total = torch.zeros(())
        done = 0
        for stage in self._stages:
            optimizer = torch.optim.Adam([images], lr=self._lr, betas=self._betas, fused=True)
            progress = Progress(log, steps=done + stage.steps)
            for step in range(stage.steps):
                for group in optimizer.param_groups:
                    group["lr"] = self._lr * warmup_cosine(step, steps=stage.steps, warmup=self._warmup)
                seen = F.avg_pool2d(images, stage.pool) if stage.pool > 1 else images
                _, value = judge(self._setting.augment(seen, rng), targets, groups=groups)
                optimizer.zero_grad()
                # Terms are means over images; the sum over classes keeps a class's gradient free of its neighbours.
                (value.total * groups).backward()
                optimizer.step()
                if self._clip:
                    with torch.no_grad():
                        images.clamp_(low, high)
                done += 1
                progress(done, value)
                total = value.total
        return judge.keep(images.detach(), targets, total.item())


def _try_teacher(setting: Setting, pool: int) -> None:
    size = setting.space.size // pool
    try:
        with torch.no_grad():
            setting.judge.teacher(torch.zeros(2, setting.space.channels, size, size, device=setting.device))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"stages: pool is {pool}, but the teacher cannot take {size} pixels ({reason}); use pool 1"
        ) from None
