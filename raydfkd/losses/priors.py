"""Terms that read the images alone."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from raydfkd.config.schema import PositiveFloat
from raydfkd.losses.objective import TERMS, Term, View
from raydfkd.networks.compiled import Compiled

_REACH = 2
"""Pixels that a blur reaches to each side."""


@TERMS.register("total_variation")
class TotalVariation(Term):
    """Roughness of the images: differences of each pixel to its right, lower and diagonal neighbours.

    ``l2``: per image, the sum over the four directions of the L2 norm of the differences; mean over images. The
    released code of Yin et al. 2020 takes one norm over the whole batch, which grows with the square root of the
    batch size: its weight w at batch B corresponds to w * sqrt(B) here.
    ``l1``: sum over directions of the mean absolute difference. ``squared``: sum over directions of the mean squared
    difference. In nominal units (``images.pixels``), those of images normalised for ImageNet, in which published
    weights are stated; in [0, inf).

    Args:
        norm: l2, l1 or squared.
    """

    def __init__(self, *, norm: Literal["l2", "l1", "squared"] = "l2") -> None:
        super().__init__()
        self._norm = norm

    @override
    def forward(self, view: View) -> Tensor:
        variation = _COMPILED_VARIATION if view.compiled else _variation
        value: Tensor = variation(view.images, self._norm)
        return value


@TERMS.register("image_l2")
class ImageL2(Term):
    """L2 norm of each image, mean over images: its distance from mid-grey.

    In nominal units (``images.pixels``), in [0, inf). Source: Yin et al. 2020.
    """

    @override
    def forward(self, view: View) -> Tensor:
        size = _COMPILED_SIZE if view.compiled else _size
        value: Tensor = size(view.images)
        return value


@TERMS.register("smoothness")
class Smoothness(Term):
    """Mean squared difference between the images and themselves blurred: low where they have no fine detail.

    In nominal units squared (``images.pixels``), a mean over images, channels and pixels; in [0, inf). The blur is a
    Gaussian over 5x5 pixels, at whose edge the image's last pixel is repeated. Source: Smith et al. 2021 (Always Be
    Dreaming), where the edge is mirrored and a ``sigma`` of 1 is one of 1.414 here, because the released code takes its
    exponent's half twice.

    Args:
        sigma: standard deviation of the blur, in pixels.
    """

    def __init__(self, *, sigma: PositiveFloat = 1.0) -> None:
        super().__init__()
        row = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-_REACH, _REACH + 1)]
        self._row = [value / sum(row) for value in row]

    @override
    def forward(self, view: View) -> Tensor:
        images = view.images
        row = images.new_tensor(self._row)
        maps = F.pad(images.flatten(0, 1).unsqueeze(1), (_REACH,) * 4, mode="replicate")
        blurred = F.conv2d(F.conv2d(maps, row.view(1, 1, 1, -1)), row.view(1, 1, -1, 1))
        return F.mse_loss(blurred.view_as(images), images)


@TERMS.register("pixel_moments")
class PixelMoments(Term):
    """Squared distance of the pixels' mean and standard deviation, in the teacher's units, from 0 and 1.

    Those are the moments that the teacher's normalisation says of its training data, so this is what a teacher without
    BatchNorm knows of them. It holds where the constants of ``image_space`` were measured; those of a teacher that
    takes pixels from -1 to 1 are a mere convention. A scalar in [0, inf): the mean over channels of the sum of both
    squares. Source: Cai et al. 2020 (ZeroQ), the term of the input; its sum over channels is a mean here.

    Args:
        scope: moments of each image over its pixels, the value being a mean over images, or of the whole batch.
    """

    def __init__(self, *, scope: Literal["image", "batch"] = "image") -> None:
        super().__init__()
        self._dims = (2, 3) if scope == "image" else (0, 2, 3)
        self.is_per_image = scope == "image"

    @override
    def forward(self, view: View) -> Tensor:
        assert view.seen is not None, "pixel_moments needs the images in the teacher's units"
        var, mean = torch.var_mean(view.seen, self._dims, correction=0)
        return (mean.square() + ((var + 1e-8).sqrt() - 1).square()).mean()


def _variation(images: Tensor, norm: str) -> Tensor:
    differences = (
        images[..., :, 1:] - images[..., :, :-1],
        images[..., 1:, :] - images[..., :-1, :],
        images[..., 1:, :-1] - images[..., :-1, 1:],
        images[..., 1:, 1:] - images[..., :-1, :-1],
    )
    if norm == "l2":
        return sum((_size(difference) for difference in differences), start=images.new_zeros(()))
    values = (difference.abs() if norm == "l1" else difference.square() for difference in differences)
    return sum((value.mean() for value in values), start=images.new_zeros(()))


def _size(images: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(images.flatten(1), dim=1)
    return norms.mean()


# Written out, the differences and their gradients are twenty passes over the images, a third of a step on a GPU.
_COMPILED_VARIATION = Compiled(_variation, name="total_variation")
_COMPILED_SIZE = Compiled(_size, name="image_l2")
