"""What an optimisation of pixels works on, and what the teacher sees of it in each stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import model_validator
from torch import Tensor
from torch.nn import functional as F

from raydfkd.config.schema import Augmentation, Positive, Size, Spec
from raydfkd.images.pixels import BLACK, WHITE

Edges = tuple[int, int]
"""Height and width in pixels."""


class Stage(Spec):
    """Part of an optimisation at one resolution."""

    steps: Positive
    """Optimiser steps."""
    pool: Positive = 1
    """Edge of the squares of pixels that are averaged before the teacher looks."""
    size: Size | None = None
    """Pixels to which images are scaled before the teacher looks, in the place of ``pool``."""
    augment: tuple[Augmentation, ...] | None = None
    """Augmentations of the averaged images; ``synthesis.augment`` unless given."""

    @model_validator(mode="after")
    def _one_size(self) -> Stage:
        if self.size is not None and self.pool > 1:
            raise ValueError(f"size is given, but pool is {self.pool} as well; drop either")
        return self

    def edges(self, whole: Edges) -> Edges:
        """What the teacher sees of images of ``whole`` pixels."""
        if self.size is None:
            return whole[0] // self.pool, whole[1] // self.pool
        return (self.size, self.size) if isinstance(self.size, int) else self.size


class Canvas:
    """N nominal images as the sum of octaves, each of half the resolution of the one before, which are optimised.

    One octave is the images themselves. With more, a step on a coarse one moves large areas at once, so that what is
    made has the large forms and soft spectrum of photographs instead of detail in every pixel. A stage that sees fewer
    pixels leaves out the octaves that it cannot see.

    Args:
        octaves: [N, C, H, W] each, the finest first.
    """

    def __init__(self, octaves: Sequence[Tensor]) -> None:
        self.octaves = [octave.requires_grad_() for octave in octaves]

    @classmethod
    def begin(cls, start: Tensor, count: int) -> Canvas:
        """Images that begin as ``start`` [N, C, H, W], which is copied, in ``count`` octaves."""
        coarse = [start.clone()]
        for _ in range(count - 1):
            height, width = _edges(coarse[-1])
            coarse.append(_scaled(coarse[-1], (-(-height // 2), -(-width // 2))))
        octaves = [fine - _enlarged(rough, _edges(fine)) for fine, rough in zip(coarse, coarse[1:], strict=False)]
        return cls([*octaves, coarse[-1]])

    @property
    def whole(self) -> Edges:
        """Pixels of the images."""
        return _edges(self.octaves[0])

    def within(self, stage: Stage) -> list[Tensor]:
        """The octaves that ``stage`` sees, the finest first; the images themselves where they are the only one."""
        edges = stage.edges(self.whole)
        seen = [octave for octave in self.octaves if max(_edges(octave)) <= max(edges)]
        return seen or self.octaves[-1:]

    def seen(self, stage: Stage) -> Tensor:
        """The images as the teacher sees them in ``stage``, before augmentations."""
        if len(self.octaves) == 1 and stage.pool > 1:
            return F.avg_pool2d(self.octaves[0], stage.pool)
        return _scaled(_sum(self.within(stage)), stage.edges(self.whole))

    def images(self, last: Stage) -> Tensor:
        """The whole images as they are after the stage ``last``, without gradients."""
        with torch.no_grad():
            return _scaled(_sum(self.within(last)), self.whole)

    @torch.no_grad()
    def clip(self, stage: Stage) -> None:
        """Bring what ``stage`` sees back between black and white, in the finest octave that it sees."""
        within = self.within(stage)
        if len(within) == 1:
            within[0].clamp_(BLACK, WHITE)
            return
        images = _sum(within)
        within[0].add_(images.clamp(BLACK, WHITE).sub_(images))


def _edges(images: Tensor) -> Edges:
    return images.shape[2], images.shape[3]


def _sum(octaves: Sequence[Tensor]) -> Tensor:
    images = octaves[-1]
    for octave in reversed(octaves[:-1]):
        images = octave + _enlarged(images, _edges(octave))
    return images


def _enlarged(images: Tensor, edges: Edges) -> Tensor:
    return F.interpolate(images, size=edges, mode="bilinear", align_corners=False)


def _scaled(images: Tensor, edges: Edges) -> Tensor:
    if _edges(images) == edges:
        return images
    return F.interpolate(images, size=edges, mode="bilinear", align_corners=False, antialias=True)
