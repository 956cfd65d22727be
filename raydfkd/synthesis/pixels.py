"""Optimising the pixels of a batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from raydfkd.batches import SyntheticBatch
from raydfkd.recipe import BelowOne, Count, Positive, PositiveFloat, Spec
from raydfkd.schedule import Request
from raydfkd.synthesis.synthesizer import SYNTHESIZERS, Log, Progress, Setting, rng_from, warmup_cosine


class Stage(Spec):
    """Part of an optimisation at one resolution."""

    steps: Positive
    """Optimiser steps."""
    pool: Positive = 1
    """Edge of the squares of pixels that are averaged before the teacher looks."""


@SYNTHESIZERS.register("pixels")
class PixelSynthesizer:
    """Optimises a batch of images from noise, in stages of growing resolution; the last iterate is kept.

    Each stage has a fresh Adam, a warm-up and a cosine to zero. Augmentations apply to what the teacher sees; the
    terms judge that view. Source: Yin et al. 2020, settings 0 and 1 of the released code; unlike there, "best"
    iterates are not kept, because losses of different steps are of different views.

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
            yield self._invert(images, targets, len(request.classes), augmenting, log)

    def _invert(
        self, noise: Tensor, targets: Tensor | None, groups: int, rng: torch.Generator, log: Log
    ) -> SyntheticBatch:
        device, judge = self._setting.device, self._setting.judge
        images = noise.to(device).requires_grad_()
        targets = None if targets is None else targets.to(device)
        low, high = judge.pixels.bounds
        total = torch.zeros(())
        done = 0
        for stage in self._stages:
            optimizer = torch.optim.Adam([images], lr=self._lr, betas=self._betas)
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
