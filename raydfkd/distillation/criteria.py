"""Distances between the answers of student and teacher to the same images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from raydfkd.config.registry import Registry
from raydfkd.networks.observed import Observation


class Criterion(ABC):
    """A scalar to minimise, a mean over images; declares what it needs beside the answers of student and teacher."""

    needs_labels: ClassVar[bool] = False
    """Whether it reads the labels, which must then be those of the images as the student sees them."""

    @abstractmethod
    def __call__(self, student: Observation, teacher: Observation, labels: Tensor) -> Tensor:
        """Compare two observations of N images with labels [N]."""


CRITERIA: Registry[Criterion] = Registry("criterion", [])


@CRITERIA.register("soft_kl")
class SoftKL(Criterion):
    """Kullback-Leibler divergence of softened answers, times the squared temperature; nats, mean over images.

    ``forward`` is KL(teacher || student) (Hinton et al. 2015), ``backward`` KL(student || teacher).

    Args:
        temperature: divides both logits.
        direction: forward or backward.
    """

    def __init__(self, *, temperature: float = 4.0, direction: Literal["forward", "backward"] = "forward") -> None:
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}; it must be positive")
        self._temperature = temperature
        self._direction = direction

    @override
    def __call__(self, student: Observation, teacher: Observation, labels: Tensor) -> Tensor:
        approximation = (student.logits / self._temperature).log_softmax(1)
        reference = (teacher.logits / self._temperature).log_softmax(1)
        if self._direction == "backward":
            approximation, reference = reference, approximation
        divergence = F.kl_div(approximation, reference, log_target=True, reduction="batchmean")
        return divergence * self._temperature**2


@CRITERIA.register("logit_l1")
class LogitL1(Criterion):
    """Mean absolute difference of logits over images and classes (Fang et al. 2019, DFAD)."""

    @override
    def __call__(self, student: Observation, teacher: Observation, labels: Tensor) -> Tensor:
        return F.l1_loss(student.logits, teacher.logits)


@CRITERIA.register("hard_labels")
class HardLabels(Criterion):
    """Cross-entropy with the stored labels; nats, mean over images. The control that ignores the teacher's answer."""

    needs_labels = True

    @override
    def __call__(self, student: Observation, teacher: Observation, labels: Tensor) -> Tensor:
        return F.cross_entropy(student.logits, labels)
