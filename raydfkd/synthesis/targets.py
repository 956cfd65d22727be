"""Targets that images are made for: labels, or distributions that tell how alike the teacher takes classes to be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from raydfkd.config.registry import Registry
from raydfkd.config.schema import PositiveFloat, Text
from raydfkd.networks.inside import TeacherInside, cosine_similarity

CANDIDATES = 32
"""Draws for each soft target, of which one that has its class on top is taken."""
JITTER = 1e-6
"""Added to the diagonal of a similarity matrix, which is singular where there are more units than inputs."""


class TargetSampler(ABC):
    """Draws the targets of a batch, class by class; the engine supplies it with the inside of the teacher."""

    is_conditional: ClassVar[bool] = True
    """Whether each image has a class that it is made for."""
    is_soft: ClassVar[bool] = False
    """Whether targets are distributions over the classes, drawn anew for each image."""

    def __init__(self, inside: TeacherInside) -> None:
        self._inside = inside

    @abstractmethod
    def __call__(
        self, classes: tuple[int, ...], images_per_class: int, rngs: Sequence[torch.Generator]
    ) -> Tensor | None:
        """Targets of a batch in class-major order, or None for unconditional synthesis.

        They are labels [N] or distributions [N, K] whose largest entry is the class. What is drawn for a class is
        drawn from its own one of ``rngs``, so that it does not depend on who shares the pack.
        """


TARGETS: Registry[TargetSampler] = Registry("target sampler", [], member="is_soft")


@TARGETS.register("balanced")
class Balanced(TargetSampler):
    """As many images of each class of the unit; labels [N], class-major."""

    @override
    def __call__(self, classes: tuple[int, ...], images_per_class: int, rngs: Sequence[torch.Generator]) -> Tensor:
        return torch.tensor(classes).repeat_interleave(images_per_class)


@TARGETS.register("none")
class Unconditional(TargetSampler):
    """No targets: one generator for all classes; what was made is labelled by the teacher afterwards."""

    is_conditional = False

    @override
    def __call__(self, classes: tuple[int, ...], images_per_class: int, rngs: Sequence[torch.Generator]) -> None:
        return


class SoftTargets(TargetSampler):
    """Distributions [N, K] for as many images of each class, with the class on top.

    A target is the first of a few draws whose largest entry is the class. Where there is none, which is usual among
    many classes, the draw in which the class comes nearest to the top is taken and its two entries change places.
    """

    is_soft = True

    @abstractmethod
    def draw(self, label: int, count: int, rng: torch.Generator) -> Tensor:
        """Candidates [CANDIDATES, count, K], each a distribution over the classes."""

    @override
    def __call__(self, classes: tuple[int, ...], images_per_class: int, rngs: Sequence[torch.Generator]) -> Tensor:
        drawn = [self.draw(label, images_per_class, rng) for label, rng in zip(classes, rngs, strict=True)]
        chosen = [with_class_on_top(some, label) for label, some in zip(classes, drawn, strict=True)]
        return torch.cat(chosen).float()


def with_class_on_top(candidates: Tensor, label: int) -> Tensor:
    """One of M ``candidates`` [M, N, K] for each of N images, [N, K], its largest entry that of ``label``."""
    short = candidates.amax(2) - candidates[:, :, label]  # 0 where the class is on top; argmin takes the first of those
    chosen = candidates[short.argmin(0), torch.arange(candidates.shape[1])]
    rows, top = torch.arange(len(chosen)), chosen.argmax(1)
    swapped = chosen.clone()
    swapped[rows, top] = chosen[:, label]
    swapped[rows, label] = chosen[rows, top]
    return swapped


@TARGETS.register("dirichlet")
class Dirichlet(SoftTargets):
    """Soft targets from a Dirichlet distribution for each class, concentrated on the classes that are like it.

    The concentration of class k is the scale times row k of the cosine similarity between the weights of the last
    linear layer's classes, brought to [0, 1] row by row, plus 1e-4. Source: Nayak et al. 2019 (ZSKD). Its released code
    brings the rows to [0, 1] again after the scale, which cancels it, so that both halves of its set are drawn alike;
    ours are not. Unlike there, the class of a row is on top in each of its targets. An objective reads them by
    cross_entropy, with a temperature of 20 in the source.

    Args:
        scales: factors of the concentration, each for an equal share of the images; below 1 most of a target is on
            one class.
    """

    def __init__(
        self,
        inside: TeacherInside,
        *,
        scales: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1.0, 0.1),
    ) -> None:
        super().__init__(inside)
        self._concentrations = dirichlet_concentrations(inside.head("synthesis.targets dirichlet"), scales).numpy()

    @override
    def draw(self, label: int, count: int, rng: torch.Generator) -> Tensor:
        num_scales = len(self._concentrations)
        # Scales take turns from a random one on, so that each has its share also where a batch has one image a class.
        first = int(torch.randint(num_scales, (), generator=rng))
        source = np.random.default_rng(int(torch.randint(1 << 62, (), generator=rng)))
        rows = [self._concentrations[(first + image) % num_scales, label] for image in range(count)]
        return torch.stack([torch.from_numpy(source.dirichlet(row, CANDIDATES)) for row in rows], 1)


def dirichlet_concentrations(weight: Tensor, scales: Sequence[float]) -> Tensor:
    """Concentrations [S, K, K] of S scales for the classes whose weights are the rows of ``weight`` [K, D]."""
    similar = cosine_similarity(weight)
    low, high = similar.amin(1, keepdim=True), similar.amax(1, keepdim=True)
    rows = (similar - low) / (high - low).clamp_min(1e-12)
    return torch.stack([scale * rows + 1e-4 for scale in scales])


@TARGETS.register("gaussian")
class Gaussian(SoftTargets):
    """Soft targets from normal scores that are correlated as the weights of a linear layer are alike.

    Scores are drawn from N(0, D R D): R is the cosine similarity between the weight rows of the layer's units, D the
    standard deviation. Those of the last layer are softened to targets; those of an inner one pass through the rest of
    the teacher first. Source: Wang 2021 (soft-targeted transfer set), who leaves the mean open (ours is 0) and takes
    the positive part of an inner layer's weights, which ours does not. Unlike there, images are made for a class each,
    which is on top in its target.

    Args:
        std: standard deviation of the scores: a large one makes targets nearly labels, a small one nearly uniform.
        temperature: divides the logits before the softmax.
        layer: path of an inner linear layer through whose answer everything passes; the last layer unless given.
    """

    def __init__(
        self,
        inside: TeacherInside,
        *,
        std: PositiveFloat,
        temperature: PositiveFloat = 1.0,
        layer: Text | None = None,
    ) -> None:
        super().__init__(inside)
        self._layer, self._temperature = layer, temperature
        weight = (
            inside.head("synthesis.targets gaussian")
            if layer is None
            else inside.layer(layer, "synthesis.targets.layer")
        )
        self._factor = std * correlation_factor(weight)

    @override
    def draw(self, label: int, count: int, rng: torch.Generator) -> Tensor:
        noise = torch.randn(CANDIDATES * count, len(self._factor), generator=rng, dtype=torch.float64)
        scores = noise @ self._factor.T
        logits = scores if self._layer is None else self._inside.tail(self._layer, scores.float()).double()
        targets: Tensor = (logits / self._temperature).softmax(1).unflatten(0, (CANDIDATES, count))
        return targets


def correlation_factor(weight: Tensor) -> Tensor:
    """Lower triangle [k, k] whose product with its transpose is the cosine similarity of the rows of ``weight``."""
    similar = cosine_similarity(weight)
    factor: Tensor = torch.linalg.cholesky(similar + JITTER * torch.eye(len(similar), dtype=similar.dtype))
    return factor
