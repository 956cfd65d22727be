"""Units of pixels: stored ones, nominal ones, and what a network takes.

Stored pixels are uint8. *Nominal* units are the same for every teacher: mid-grey is 0 and the range from black to white
is 1/0.225 wide, as that of images normalised for ImageNet is, so an image has about unit variance. Synthesis and
augmentations work in them, and learning rates, noise and priors on images are stated in them; so a teacher that takes
0..1, 0..255 or normalised images is inverted alike. Only what asks a network knows the units of that network.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from raydfkd.config.schema import ImageSpace

NOMINAL = 0.225
"""One nominal unit, as a share of the range from black to white."""
BLACK, WHITE = -0.5 / NOMINAL, 0.5 / NOMINAL
"""Both in nominal units."""


def nominal_from_unit(images: Tensor) -> Tensor:
    """Images in [0, 1] to nominal units."""
    return (images - 0.5) / NOMINAL


def nominal_from_uint8(images: Tensor) -> Tensor:
    """Stored pixels to nominal float32."""
    return nominal_from_unit(images.to(torch.float32) / 255)


def nominal_to_uint8(images: Tensor) -> Tensor:
    """Nominal images to the nearest stored pixels; what lies beyond black or white is clipped."""
    return (images * NOMINAL + 0.5).mul(255).round().clamp(0, 255).to(torch.uint8)


class PixelRange:
    """The units that a network takes: those of one image space, on one device.

    Images that were ``made`` smaller than the network takes them are enlarged, by the same factor whatever their size,
    so that those that were averaged before stay smaller; larger ones are scaled down, each pixel an average.
    """

    def __init__(
        self, space: ImageSpace, device: torch.device | str = "cpu", *, made: ImageSpace | None = None
    ) -> None:
        made = made or space
        self._factors = (space.height / made.height, space.width / made.width)
        self._shrinks = min(self._factors) < 1
        self.shape = space.shape
        """Channels, height and width of the images."""
        self._mean = torch.tensor(space.mean, device=device).view(1, -1, 1, 1)
        self._std = torch.tensor(space.std, device=device).view(1, -1, 1, 1)
        self._scale, self._shift = NOMINAL / self._std, (0.5 - self._mean) / self._std

    def from_nominal(self, images: Tensor) -> Tensor:
        """Nominal images [N, C, H, W] to what the network takes."""
        return self.normalized(self.enlarged(images))

    def normalized(self, images: Tensor) -> Tensor:
        """Nominal images of the network's size to what it takes."""
        return torch.addcmul(self._shift, images, self._scale)

    def from_uint8(self, images: Tensor) -> Tensor:
        """Stored pixels to what the network takes, float32."""
        return (self.enlarged(images.to(torch.float32)) / 255 - self._mean) / self._std

    def enlarged(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] of floats at the size of the network; as they are where they were made in it."""
        if self._factors == (1, 1):
            return images
        size = [round(edge * factor) for edge, factor in zip(images.shape[2:], self._factors, strict=True)]
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=self._shrinks)
