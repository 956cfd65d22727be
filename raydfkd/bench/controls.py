"""The controls of a table of methods: noise, and random real images, both with the teacher's answers.

A student learns from answers as well as from images. What it learns of answers to real images is what no synthesis can
be expected to beat; what it learns of answers to noise is owed to no synthesis.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from raydfkd.config.recipe import Recipe
from raydfkd.data.batches import SyntheticBatch
from raydfkd.images.pixels import nominal_from_uint8
from raydfkd.images.real_data import in_memory
from raydfkd.runner.teach import judging_data
from raydfkd.seeds import derive_seed, rng_from
from raydfkd.synthesis.checkpoint import NO_HOOK, StepHook
from raydfkd.synthesis.synthesizer import Log, Setting
from raydfkd.units import Request

REAL, NOISE = "real_images", "gaussian_noise"
"""Names of the controls in the place of a method's; noise is a packaged method, real images are none."""
AT_ONCE = 100
"""Images that the teacher is asked about at once."""


class RealImages:
    """A synthesizer that makes nothing: images of the training split in random order, labelled by the teacher.

    Args:
        setting: as every synthesizer has it.
        recipe: whose real data are taken.
    """

    def __init__(self, setting: Setting, *, recipe: Recipe) -> None:
        self._setting = setting
        images = in_memory(judging_data(recipe).load("train")).images
        order = torch.randperm(len(images), generator=rng_from(derive_seed(recipe.seed, REAL)))
        self._images = images[order]
        self._next = 0

    def produce(self, request: Request, log: Log, hook: StepHook = NO_HOOK) -> Iterator[SyntheticBatch]:
        """Stream as many images as ``request`` asks for, no two alike until all have been seen."""
        for start in range(0, request.count, AT_ONCE):
            count = min(AT_ONCE, request.count - start)
            rows = torch.arange(self._next, self._next + count) % len(self._images)
            self._next += count
            images = nominal_from_uint8(self._images[rows].to(self._setting.device))
            yield self._setting.judge.keep(images, None, 0.0)
