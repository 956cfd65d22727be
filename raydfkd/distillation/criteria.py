"""Distances between what student and teacher say of the same images."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor
from torch.nn import functional as F

from raydfkd.config.registry import Registry
from raydfkd.networks.observed import Observation


class Criterion(Protocol):
    """A scalar to minimise, a mean over images."""

    def __call__(self, student: Observation, teacher: Observation, labels: Tensor) -> Tensor:
        """Compare two observations of N images with labels [N]."""


CRITERIA: Registry[Criterion] = Registry("criterion", [])


@CRITERIA.register("soft_kl")
class SoftKL:
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

    def __call__(self, student: Observation, teacher: Observation, labels: Tensor) -> Tensor:
        """See the class."""
        approximation = (student.logits / self._temperature).log_softmax(1)
        reference = (teacher.logits / self._temperature).log_softmax(1)
        if self._direction == "backward":
            approximation, reference = reference, approximation
        divergence = F.kl_div(approximation, reference, log_target=True, reduction="batchmean")
        return divergence * self._temperature**2


@CRITERIA.register("logit_l1")
class LogitL1:
    """Mean absolute difference of logits over images and classes (Fang et al. 2019, DFAD)."""

    def __call__(self, student: Observation, teacher: Observation, labels: Tensor) -> Tensor:
        """See the class."""
        return F.l1_loss(student.logits, teacher.logits)


@CRITERIA.register("hard_labels")
class HardLabels:
    """Cross-entropy with the stored labels; nats, mean over images. The control that ignores the teacher's answer."""

    def __call__(self, student: Observation, teacher: Observation, labels: Tensor) -> Tensor:
        """See the class."""
        return F.cross_entropy(student.logits, labels)
