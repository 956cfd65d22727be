"""Distances between the answers of student and teacher to the same images."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from raydfkd.config.registry import Registry
from raydfkd.config.schema import BelowOne, Fraction
from raydfkd.networks.observed import Observation, Tap

LEAST_DEVIATION = 0.1
"""Of logits over the classes, so that an image of which the teacher says nothing is not blown up."""


class Criterion(ABC):
    """A scalar to minimise, a mean over images; declares what it needs beside the answers of student and teacher."""

    needs_labels: ClassVar[bool] = False
    """Whether it reads the labels, which must then be those of the images as the student sees them."""
    takes_mixed_labels: ClassVar[bool] = False
    """Whether labels may also be the shares of the classes in an image [N, K], where augmentations mix images."""

    @property
    def student_taps(self) -> frozenset[Tap]:
        """Reads of the student beside its answer, such as a ``Layer``."""
        return frozenset()

    @property
    def teacher_taps(self) -> frozenset[Tap]:
        """Reads of the teacher beside its answer; stored logits do not have them."""
        return frozenset()

    def connector(self, student: Observation, teacher: Observation) -> nn.Module | None:
        """Fresh layers that are trained along with the student, made for what was observed of a few images.

        They are given to ``attach`` with the weights that they are trained with. None where nothing is trained.
        """
        return None

    def attach(self, connector: nn.Module) -> None:
        """Use ``connector`` from now on; for those that have one."""
        raise NotImplementedError

    @abstractmethod
    def __call__(self, student: Observation, teacher: Observation, labels: Tensor) -> Tensor:
        """Compare two observations of N images with labels [N]."""


CRITERIA: Registry[Criterion] = Registry("criterion", ["raydfkd.distillation.features"])


@CRITERIA.register("soft_kl")
class SoftKL(Criterion):
    """Kullback-Leibler divergence of softened answers, times the squared temperature; nats, mean over images.

    ``forward`` is KL(teacher || student) (Hinton et al. 2015): the student covers every class that the teacher gives
    some probability. ``backward`` is KL(student || teacher) (Sun & Cross 2020): it commits to classes that the teacher
    finds likely, and those that it gives no probability hardly move. ``mixed`` is the share ``alpha`` of the first and
    the rest of the second.

    ``standardised`` divides each image's logits by their deviation over the classes, so that images on which a
    teacher's logits are large count no more than others. ``teacher`` divides those of both by the teacher's: a
    temperature that fits the image. ``each`` divides the student's by its own (Sun et al. 2024), which leaves their
    scale open, so that its confidence says little.

    Args:
        temperature: divides both logits.
        direction: forward, backward or mixed.
        alpha: share of forward in mixed.
        standardised: by whose deviation; by none unless given.
    """

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        direction: Literal["forward", "backward", "mixed"] = "forward",
        alpha: Fraction = 0.5,
        standardised: Literal["teacher", "each"] | None = None,
    ) -> None:
        self._temperature = _positive(temperature)
        self._standardised = standardised
        self._forward = {"forward": 1.0, "backward": 0.0, "mixed": alpha}[direction]

    @override
    def __call__(self, student: Observation, teacher: Observation, labels: Tensor) -> Tensor:
        scales: tuple[Tensor | float, Tensor | float] = (1.0, 1.0)
        if self._standardised is not None:
            scale = _deviation(teacher.logits)
            scales = (scale if self._standardised == "teacher" else _deviation(student.logits), scale)
        ours, theirs = (
            answer.logits.div(scale * self._temperature).log_softmax(1)
            for answer, scale in zip((student, teacher), scales, strict=True)
        )
        divergence = ours.new_zeros(())
        if self._forward > 0:
            divergence = divergence + self._forward * _divergence(theirs, ours)
        if self._forward < 1:
            divergence = divergence + (1 - self._forward) * _divergence(ours, theirs)
        return divergence * self._temperature**2


@CRITERIA.register("js")
class JensenShannon(Criterion):
    """Jensen-Shannon divergence of softened answers: half the divergences of both from their mean.

    Nats, mean over images; in [0, ln 2], so that no image counts for more than that, however sure and wrong the
    student is. Computed from logarithms, so that it has a gradient there. It is not multiplied by the squared
    temperature as ``soft_kl`` is; the first argument of each divergence is an answer, where the released code of
    Adaptive DeepInversion has the mean there.

    Args:
        temperature: divides both logits.
    """

    def __init__(self, *, temperature: float = 1.0) -> None:
        self._temperature = _positive(temperature)

    @override
    def __call__(self, student: Observation, teacher: Observation, labels: Tensor) -> Tensor:
        ours, theirs = _log_shares(student, self._temperature), _log_shares(teacher, self._temperature)
        mean = torch.logaddexp(ours, theirs) - math.log(2)
        return (_divergence(ours, mean) + _divergence(theirs, mean)) / 2


@CRITERIA.register("logit_l1")
class LogitL1(Criterion):
    """Mean absolute difference of logits over images and classes (Fang et al. 2019, DFAD)."""

    @override
    def __call__(self, student: Observation, teacher: Observation, labels: Tensor) -> Tensor:
        return F.l1_loss(student.logits, teacher.logits)


@CRITERIA.register("logit_mse")
class LogitMSE(Criterion):
    """Mean squared difference of logits over images and classes (Ba & Caruana 2014)."""

    @override
    def __call__(self, student: Observation, teacher: Observation, labels: Tensor) -> Tensor:
        return F.mse_loss(student.logits, teacher.logits)


@CRITERIA.register("hard_labels")
class HardLabels(Criterion):
    """Cross-entropy with the labels; nats, mean over images. Alone it is the control that ignores the teacher's answer.

    Where augmentations mix images, labels are mixed by the same shares.

    Args:
        smoothing: share of each label that is spread over all classes (Szegedy et al. 2016).
    """

    needs_labels = True
    takes_mixed_labels = True

    def __init__(self, *, smoothing: BelowOne = 0.0) -> None:
        self._smoothing = smoothing

    @override
    def __call__(self, student: Observation, teacher: Observation, labels: Tensor) -> Tensor:
        return F.cross_entropy(student.logits, labels, label_smoothing=self._smoothing)


def _positive(temperature: float) -> float:
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    return temperature


def _deviation(logits: Tensor) -> Tensor:
    """Deviation of logits [N, K] over the classes of each image, [N, 1]; never nearly zero."""
    centred = logits - logits.mean(1, keepdim=True)
    return (centred.square().mean(1, keepdim=True) + LEAST_DEVIATION**2).sqrt()


def _log_shares(answer: Observation, temperature: float) -> Tensor:
    return (answer.logits / temperature).log_softmax(1)


def _divergence(reference: Tensor, approximation: Tensor) -> Tensor:
    """KL(reference || approximation) of log-probabilities [N, K], a mean over images."""
    return F.kl_div(approximation, reference, log_target=True, reduction="batchmean")
