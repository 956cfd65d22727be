"""Terms that read the images alone."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from raydfkd.losses.objective import TERMS, Term, View
from raydfkd.networks.compiled import Compiled


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
