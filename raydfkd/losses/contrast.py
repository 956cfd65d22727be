"""Contrast: every image is to be told from all others by what the teacher sees in it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from raydfkd.config.schema import Fraction, Positive, PositiveFloat
from raydfkd.losses.objective import TERMS, Term, View
from raydfkd.networks.observed import Layer, Need, Observation, Tap
from raydfkd.seeds import seeded


@TERMS.register("contrast")
class Contrast(Term):
    """Choosing the image that a second view is of, among the batch and images kept before: high where all look alike.

    The teacher is asked about a second view of each image, a random part of it, resized and in half of the cases
    mirrored. A head, linear, ReLU and linear, maps what the teacher sees to directions of ``width`` numbers; for each
    second view the right image is chosen from the N of the batch and ``negatives`` kept ones by the cosine of the two
    directions over ``temperature``, and the value is the cross-entropy of the choice. The same is added for the kept
    images and their second views, which trains the head. Nats, a mean over the batch and one over the kept images; from
    0 up. Gradients reach the images through the second view only.

    The head is trained along with the images. It and the bank of kept images, which is empty at first, begin anew with
    each unit; a unit that draws images once contrasts within the batch only. In a live training of several workers each
    has its own.

    Source: Fang et al. 2021 (CMI). There head and bank last for a whole run, which would make a unit depend on those
    before it; the bank has room for 40,960 images, of which a step sees 4,096; second views are of images before their
    augmentation; and features are the means of the inputs of BatchNorm layers.

    Args:
        layers: paths of layers whose outputs are averaged over positions and put side by side; the input of the last
            linear layer unless given.
        width: numbers of the head's layers.
        temperature: divides the cosines.
        negatives: kept images that a step sees at most, drawn anew in each.
        bank: kept images that are remembered, the newest.
        crop: least share of the image's area in a second view.
    """

    is_per_image = False
    bank: Tensor
    """[K, 2, D]: features of the K images that are remembered, and of their second views."""

    def __init__(
        self,
        *,
        layers: tuple[str, ...] = (),
        width: Positive = 256,
        temperature: PositiveFloat = 0.2,
        negatives: Positive = 1024,
        bank: Positive = 4096,
        crop: Fraction = 0.25,
    ) -> None:
        super().__init__()
        if crop <= 0:
            raise ValueError(f"crop is {crop}; it must be above 0, such as 0.25")
        self._layers = layers
        self._width = width
        self._temperature = temperature
        self._negatives = negatives
        self._room = bank
        self._crop = crop

    @property
    def taps(self) -> frozenset[Tap]:
        """The layers that are named, else the features."""
        return frozenset(Layer(path) for path in self._layers) or frozenset({Need.FEATURES})

    @override
    def prepare(self, seen: Observation) -> None:
        features = self._features(seen)
        size = features.shape[1]
        with seeded(0):
            self.head = nn.Sequential(nn.Linear(size, self._width), nn.ReLU(), nn.Linear(self._width, self._width))
        self.register_buffer("bank", torch.zeros(0, 2, size))

    @override
    def forward(self, view: View) -> Tensor:
        pairs = torch.cat([self._pairs(view), self._kept()])
        first, second = F.normalize(self.head(pairs), dim=2).unbind(1)
        logits = second @ first.detach().t() / self._temperature
        losses = F.cross_entropy(logits, torch.arange(len(logits), device=logits.device), reduction="none")
        batch, kept = losses.tensor_split([len(view.images)])
        total: Tensor = batch.mean() + kept.sum() / max(1, len(kept))
        return total

    @override
    def commit(self, view: View) -> None:
        self.bank = torch.cat([self.bank, self._pairs(view)])[-self._room :]

    def _pairs(self, view: View) -> Tensor:
        """Features [N, 2, D] of the images and of a second view of each."""
        second = view.observe(_part_of_each(view.images, self._crop))
        return torch.stack([self._features(view.teacher), self._features(second)], 1)

    def _kept(self) -> Tensor:
        """Those of the bank that this step sees."""
        if len(self.bank) <= self._negatives:
            return self.bank
        return self.bank[torch.randperm(len(self.bank))[: self._negatives].to(self.bank.device)]

    def _features(self, seen: Observation) -> Tensor:
        if not self._layers:
            assert seen.features is not None, "contrast needs features"
            return seen.features
        return torch.cat([_averaged(seen.layers[path]) for path in self._layers], 1)


def _averaged(output: Tensor) -> Tensor:
    """Maps [N, C, H, W], tokens [N, T, C] or vectors [N, C] as [N, C]."""
    return output.mean(1) if output.ndim == 3 else output.flatten(2).mean(2) if output.ndim > 3 else output


def _part_of_each(images: Tensor, least: float) -> Tensor:
    """A random part of each image, of ``least`` to all of its area and an aspect of 3:4 to 4:3, resized to all of it.

    One in two is mirrored. Random numbers are torch's global ones of the CPU, so that a seed means the same everywhere.
    """
    area, aspect, x, y, mirror = torch.rand(5, len(images))
    area = least + (1 - least) * area
    aspect = (math.log(4 / 3) * (2 * aspect - 1)).exp()
    width, height = (area * aspect).sqrt().clamp_max(1), (area / aspect).sqrt().clamp_max(1)
    shifts = (1 - width) * (2 * x - 1), (1 - height) * (2 * y - 1)
    width = torch.where(mirror < 0.5, -width, width)
    zero = torch.zeros_like(width)
    rows = torch.stack([torch.stack([width, zero, shifts[0]], 1), torch.stack([zero, height, shifts[1]], 1)], 1)
    grid = F.affine_grid(rows.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
