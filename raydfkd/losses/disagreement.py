"""Terms that compare the student's answer with the teacher's: low where there is something left to learn.

Gradients reach the images through both networks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from raydfkd.losses.objective import TERMS, Term, View
from raydfkd.networks.observed import Need


@TERMS.register("competition")
class Competition(Term):
    """One minus the Jensen-Shannon divergence between student and teacher: low where they disagree.

    Reads logits [N, K] of both, softened by ``temperature``; returns a scalar in [1 - ln 2, 1] (nats), a mean over
    N. Source: Yin et al. 2020, Adaptive DeepInversion. The released code takes its divergences from the mixture
    instead of to it, of probabilities clamped to [0.01, 0.99], and clamps their mean at 1; nothing is clamped here,
    so gradients survive on confident images and with many classes.

    Args:
        temperature: divides both logits.
    """

    needs = frozenset({Need.STUDENT})

    def __init__(self, *, temperature: float = 3.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}; it must be positive")
        self._temperature = temperature

    @override
    def forward(self, view: View) -> Tensor:
        student, teacher = (F.log_softmax(logits / self._temperature, 1) for logits in _logits(view))
        mixture = torch.logaddexp(student, teacher) - math.log(2)
        divergences = [
            F.kl_div(mixture, answer, log_target=True, reduction="batchmean") for answer in (student, teacher)
        ]
        return 1 - sum(divergences, start=mixture.new_zeros(())) / 2


@TERMS.register("logit_gap")
class LogitGap(Term):
    """Negative mean absolute difference of the student's logits from the teacher's: low where they lie far apart.

    Units of the logits, mean over images and classes [N, K]; in (-inf, 0]. Its gradient does not fade where the two
    nearly agree. Source: Fang et al. 2019 (DFAD), the generator's side; there the student normalises by the batch's
    statistics, here by its running ones.
    """

    needs = frozenset({Need.STUDENT})

    @override
    def forward(self, view: View) -> Tensor:
        student, teacher = _logits(view)
        return -(student - teacher).abs().mean()


@TERMS.register("decision_gap")
class DecisionGap(Term):
    """Negative divergence KL(teacher || student) of those images that both decide alike.

    Nats, a mean over all N images, to which one that they decide differently adds nothing, not even a gradient: it
    has gone far enough. In (-inf, 0]. Source: Fang et al. 2021 (CMI), the adversarial term of the released code.
    """

    needs = frozenset({Need.STUDENT})

    @override
    def forward(self, view: View) -> Tensor:
        student, teacher = _logits(view)
        divergence = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="none").sum(1)
        is_alike = student.argmax(1) == teacher.argmax(1)
        return -torch.where(is_alike, divergence, 0).mean()


def _logits(view: View) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's."""
    assert view.student is not None, "a comparison needs the student"
    return view.student.logits, view.teacher.logits
