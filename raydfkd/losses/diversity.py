"""Terms that keep the images of a batch apart from each other."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from raydfkd.config.schema import PositiveFloat
from raydfkd.losses.objective import TERMS, Term, View
from raydfkd.networks.observed import Need


@TERMS.register("mode_seeking")
class ModeSeeking(Term):
    """Distance of two answers over the distance of their images: low where images differ more than their answers do.

    Each image of the first half of a class is paired with one of the second, or of the first half of the batch where
    images have no class; of an odd number each stands in two pairs. The value is the mean over pairs of
    ``|p - p'| / (d + epsilon)``: p is the teacher's answer in probabilities, with the Euclidean norm, d the root mean
    square difference of the pixels in nominal units (``images.pixels``). In [0, sqrt(2) / epsilon].

    Source: Han et al. 2021 (RDSKD). There one norm is taken over each half of the batch, so that the ratio says little
    of any pair, the image's norm grows with its size, and two halves that are alike divide by 1e-20. Equal answers make
    it 0, so it does not keep classes apart: class_balance does.

    Args:
        epsilon: distance of images that is added to all of them; bounds the value.
    """

    is_per_image = False

    def __init__(self, *, epsilon: PositiveFloat = 0.1) -> None:
        super().__init__()
        self._epsilon = epsilon

    @override
    def forward(self, view: View) -> Tensor:
        answers = _to_partner(view.teacher.logits.softmax(1), view.groups)
        pixels = _to_partner(view.images.flatten(1), view.groups)
        distances = torch.linalg.vector_norm(pixels, dim=1) / math.sqrt(pixels.shape[1])
        ratios: Tensor = torch.linalg.vector_norm(answers, dim=1) / (distances + self._epsilon)
        return ratios.mean()


@TERMS.register("feature_diversity")
class FeatureDiversity(Term):
    """Negative mean logarithm of the distances between the images' features: low where no two images are alike.

    Features are the last linear layer's input [N, D], each divided by its norm. The value is the mean over all pairs of
    images of ``-0.5 * log(d^2 + epsilon^2)``, which pushes nearest neighbours most; in [-0.7, -log(epsilon)], and 0
    where there is no pair. Source: the embedding diversity of K-Gen (submitted as MUSE), of which a description is
    public and no code; the norm and epsilon are ours.

    Args:
        within_class: only pairs whose target is the same class.
        epsilon: distance below which images are as good as alike.
    """

    needs = frozenset({Need.FEATURES})
    is_per_image = False

    def __init__(self, *, within_class: bool = False, epsilon: PositiveFloat = 0.01) -> None:
        super().__init__()
        self.needs_targets = within_class
        self._epsilon = epsilon

    @override
    def forward(self, view: View) -> Tensor:
        assert view.teacher.features is not None, "feature_diversity needs features"
        features = F.normalize(view.teacher.features, dim=1)
        first, second = torch.triu_indices(len(features), len(features), offset=1, device=features.device)
        if self.needs_targets:
            assert view.targets is not None, "feature_diversity within classes needs targets"
            labels = view.targets if view.targets.ndim == 1 else view.targets.argmax(1)
            is_same = labels[first] == labels[second]
            first, second = first[is_same], second[is_same]
        squares = 2 - 2 * (features @ features.T)[first, second]
        logs = (squares.clamp_min(0) + self._epsilon**2).log()
        return -0.5 * logs.sum() / max(1, len(first))


def _to_partner(rows: Tensor, groups: int) -> Tensor:
    """Differences [N, D] between each row and the one half a group further on."""
    grouped: Tensor = rows.unflatten(0, (groups, -1))
    return (grouped - grouped.roll(grouped.shape[1] // 2, 1)).flatten(0, 1)
