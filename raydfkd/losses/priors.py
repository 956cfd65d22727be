"""Terms that read the images alone."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from raydfkd.losses.objective import TERMS, Term, View


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
        x = view.images
        differences = (
            x[..., :, 1:] - x[..., :, :-1],
            x[..., 1:, :] - x[..., :-1, :],
            x[..., 1:, :-1] - x[..., :-1, 1:],
            x[..., 1:, 1:] - x[..., :-1, :-1],
        )
        return sum((self._size(difference) for difference in differences), start=x.new_zeros(()))

    def _size(self, difference: Tensor) -> Tensor:
        if self._norm == "l1":
            return difference.abs().mean()
        if self._norm == "squared":
            return difference.square().mean()
        norms: Tensor = torch.linalg.vector_norm(difference.flatten(1), dim=1)
        return norms.mean()


@TERMS.register("image_l2")
class ImageL2(Term):
    """L2 norm of each image, mean over images: its distance from mid-grey.

    In nominal units (``images.pixels``), in [0, inf). Source: Yin et al. 2020.
    """

    @override
    def forward(self, view: View) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(view.images.flatten(1), dim=1)
        return norms.mean()
