"""Whether synthetic images are good for more than the teacher that made them: what another network sees in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from raydfkd.config.recipe import Recipe
from raydfkd.config.schema import ImageSpace
from raydfkd.devices import pick_device
from raydfkd.distillation.metrics import Figures, Scores
from raydfkd.errors import RecipeError
from raydfkd.images.pixels import PixelRange
from raydfkd.images.real_data import LabelledImages, RealData, some_of
from raydfkd.job import Job
from raydfkd.networks.observed import Need, Observation, ObservedNetwork
from raydfkd.networks.teacher import Teacher
from raydfkd.networks.verifier import Verifier
from raydfkd.report.page import Gallery
from raydfkd.runner.judge import class_names
from raydfkd.runner.moment_distance import moment_distances
from raydfkd.runner.view import SetView
from raydfkd.synthesis.build import share_with_targets

IMAGES, BYTES = 2000, 256 << 20
"""Maximum of the images of a kind that are looked at, and of their bytes."""
BATCH = 32
WORST = 5
"""Classes that are named beside the figures of all; of few classes not more than half."""


def verify(
    job: Job, teacher: Teacher, verifier: Verifier | None, view: SetView, data: RealData | None
) -> dict[str, Any]:
    """What report.json has under ``verifier`` and ``moment_distance``; takes minutes for large networks on a CPU.

    ``verifier`` is about a sample of the set: shares of images that it puts in the class that they were made for
    (``top1``, ``top5``, ``per_class``, and the ``worst`` classes), and ``diversity``, see the class, of its last
    features; None where it has no linear head. ``of`` says whether the class is the ``intended`` one or the ``teacher's
    answer``, which counts where none was intended. ``real`` has the same of labelled photographs where there are some.
    All of it is None without a verifier. ``moment_distance`` has its module's figures of the same images.
    """
    recipe = job.recipe
    rows = view.sample(_most(recipe.made_space))
    if rows is None:
        return {"verifier": None, "moment_distance": None}
    synthetic = LabelledImages(images=rows.images, labels=rows.labels)
    real = None if data is None else _real(data, recipe.teacher.image_space)
    names = class_names(recipe, data)
    return {
        "verifier": None if verifier is None else _verified(recipe, verifier, synthetic, real, names),
        "moment_distance": moment_distances(recipe, teacher, synthetic.images, None if real is None else real.images),
    }


def _most(space: ImageSpace) -> int:
    channels, height, width = space.shape
    return max(1, min(IMAGES, BYTES // (channels * height * width)))


def _real(data: RealData, space: ImageSpace) -> LabelledImages | None:
    """Photographs of the split that judges; None where none can be read, as whoever judges by them says."""
    with suppress(RecipeError):
        return some_of(data.load("test" if "test" in data.splits else data.splits[-1]), _most(space))
    return None


def _verified(
    recipe: Recipe, verifier: Verifier, synthetic: LabelledImages, real: LabelledImages | None, names: tuple[str, ...]
) -> dict[str, Any]:
    asked = _Asked(recipe, verifier)
    found, diversity = asked.figures(synthetic, recipe.made_space)
    share = share_with_targets(recipe)
    of = "intended" if share == 1 else "intended or teacher's answer" if share else "teacher's answer"
    return {
        "network": verifier.name,
        "images": len(synthetic.labels),
        "of": of,
        "top1": found.top1,
        "top5": found.top5,
        "per_class": found.per_class,
        "worst": _worst(found, names),
        "diversity": diversity,
        "real": None if real is None else _of_real(asked, real, recipe.teacher.image_space),
    }


def _of_real(asked: _Asked, real: LabelledImages, space: ImageSpace) -> dict[str, Any]:
    found, diversity = asked.figures(real, space)
    return {"images": len(real.labels), "top1": found.top1, "top5": found.top5, "diversity": diversity}


def _worst(found: Figures, names: tuple[str, ...]) -> list[dict[str, Any]]:
    shares = sorted((share, label) for label, share in enumerate(found.per_class) if share is not None)
    few = shares[: min(WORST, len(shares) // 2)]
    return [{"class": label, "name": names[label], "top1": share} for share, label in few]


def with_opinion(gallery: Gallery, recipe: Recipe, verifier: Verifier | None) -> Gallery:
    """The gallery with the verifier's confidence in each picture, where there is one."""
    if verifier is None:
        return gallery
    shape = gallery.teacher_confidence.shape
    labels = torch.tensor(gallery.classes).repeat_interleave(shape[1]).split(BATCH)
    answers = _Asked(recipe, verifier).answers(gallery.images.flatten(0, 1), recipe.made_space)
    sure = [seen.logits.cpu().softmax(1).gather(1, own[:, None]) for seen, own in zip(answers, labels, strict=True)]
    return replace(gallery, verifier_confidence=torch.cat(sure).view(shape))


class _Asked:
    """A verifier on the device of the process that drives a run, with its features where they can be read."""

    def __init__(self, recipe: Recipe, verifier: Verifier) -> None:
        self._classes, self._space = recipe.teacher.classes, verifier.space
        self._device = pick_device(recipe.runtime.driver_device)
        self._network = _observed(verifier).to(self._device)

    def figures(self, labelled: LabelledImages, space: ImageSpace) -> tuple[Figures, float | None]:
        """How often it finds the labels of images of a space, and how unlike each other it finds those of a class."""
        scores, diversity = Scores(self._classes), Diversity(self._classes)
        for seen, labels in zip(self.answers(labelled.images, space), labelled.labels.split(BATCH), strict=True):
            scores.add(seen.logits.cpu(), labels)
            if seen.features is not None:
                diversity.add(seen.features.cpu(), labels)
        figures = scores.figures()
        assert figures is not None, "there are images"
        return figures, diversity.value

    @torch.no_grad()
    def answers(self, images: Tensor, space: ImageSpace) -> Iterator[Observation]:
        """What it says of uint8 images [N, C, H, W] of a space, ``BATCH`` at a time, brought to its own size."""
        pixels = PixelRange(self._space, self._device, made=space)
        for batch in images.split(BATCH):
            yield self._network(pixels.from_uint8(batch.to(self._device)))


def _observed(verifier: Verifier) -> ObservedNetwork:
    shape = verifier.space.shape
    try:
        return ObservedNetwork(verifier.module, taps={Need.FEATURES}, frozen=True, image_shape=shape, name="verifier")
    except RecipeError:  # no linear layer makes its logits
        return ObservedNetwork(verifier.module, frozen=True, image_shape=shape, name="verifier")


class Diversity:
    """Mean cosine distance between two images of a class in a network's features, 0 to 2; a mean over classes.

    It is counted batch by batch and over all pairs: the squared length of a sum of unit vectors has all their products.

    Args:
        classes: number of them.
    """

    def __init__(self, classes: int) -> None:
        self._counts = torch.zeros(classes, dtype=torch.float64)
        self._squares = torch.zeros(classes, dtype=torch.float64)
        self._sums = torch.zeros(classes, 0, dtype=torch.float64)

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Count a batch: features [N, D] and labels [N]."""
        units = F.normalize(features.double(), dim=1)
        if not self._sums.numel():
            self._sums = units.new_zeros(len(self._counts), units.shape[1])
        self._sums.index_add_(0, labels, units)
        self._squares.index_add_(0, labels, units.square().sum(1))
        self._counts.index_add_(0, labels, torch.ones(len(labels), dtype=torch.float64))

    @property
    def value(self) -> float | None:
        """The mean over classes of at least two images; None where there is none, or nothing was counted."""
        has_pairs = self._counts >= 2
        if not has_pairs.any():
            return None
        counts = self._counts[has_pairs]
        products = self._sums[has_pairs].square().sum(1) - self._squares[has_pairs]
        return float((1 - products / (counts * (counts - 1))).mean())
