"""Between stored pixels (uint8) and what a network sees (float, normalised per channel)."""

from __future__ import annotations

import torch
from torch import Tensor

from raydfkd.config.schema import ImageSpace


class PixelRange:
    """The map of one image space on one device."""

    def __init__(self, space: ImageSpace, device: torch.device | str = "cpu") -> None:
        self._mean = torch.tensor(space.mean, device=device).view(1, -1, 1, 1)
        self._std = torch.tensor(space.std, device=device).view(1, -1, 1, 1)

    def normalize(self, unit_interval: Tensor) -> Tensor:
        """[N, C, H, W] in [0, 1] to normalised."""
        return (unit_interval - self._mean) / self._std

    def from_uint8(self, images: Tensor) -> Tensor:
        """Stored pixels to normalised float32."""
        return self.normalize(images.to(torch.float32) / 255)

    def to_uint8(self, images: Tensor) -> Tensor:
        """Normalised images to the nearest stored pixels; what lies outside [0, 1] is clipped."""
        return (images * self._std + self._mean).mul(255).round().clamp(0, 255).to(torch.uint8)

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Normalised black and white, [1, C, 1, 1] each."""
        return -self._mean / self._std, (1 - self._mean) / self._std
