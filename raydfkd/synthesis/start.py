"""Real pictures as the start of an optimisation of pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raydfkd.images.pixels import nominal_from_uint8


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureStart:
    """Draws pictures to start from."""

    images: Tensor
    """uint8 [P, C, H, W]."""
    noise: float
    """Standard deviation of the noise that is added, in nominal units."""

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """Nominal images [count, C, H, W], different ones as long as there are enough pictures."""
        passes = -(-count // len(self.images))
        order = torch.cat([torch.randperm(len(self.images), generator=rng) for _ in range(passes)])
        images = nominal_from_uint8(self.images[order[:count]])
        return images + self.noise * torch.randn(images.shape, generator=rng) if self.noise else images
