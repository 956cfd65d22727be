"""Terms that compare the student's answer with the teacher's: low where there is something left to learn.

Gradients reach the images through both networks.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from raydfkd.config.schema import PositiveFloat, Ramp
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

    With ``log`` it is the mean over images of -log(1 + gap), which large gaps no longer dominate: DFAD's form for
    segmentation, but for a logarithm of each image's gap instead of the batch's. ``standardize`` compares logits minus
    their mean over the classes, divided by their standard deviation (Sun et al. 2024): a gap is then at most 2, however
    large the logits are, and no difference of scale alone.

    Args:
        log: the mean over images of -log(1 + gap) instead.
        standardize: logits with mean 0 and deviation 1 over the classes instead.
        easy_first: gap beyond which an image counts for nothing, such as {from: 0.5, to: 5, until: 0.8}: self-paced
            (Kumar et al. 2010; CuDFKD), so that what is far from the student comes later. In units of what is averaged,
            so of the logarithm with ``log``.
    """

    needs = frozenset({Need.STUDENT})

    def __init__(self, *, log: bool = False, standardize: bool = False, easy_first: Ramp | None = None) -> None:
        super().__init__()
        self._log = log
        self._standardize = standardize
        self._easy_first = _checked(easy_first)

    @override
    def forward(self, view: View) -> Tensor:
        student, teacher = map(_standardized, _logits(view)) if self._standardize else _logits(view)
        gaps = (student - teacher).abs()
        if self._log or self._easy_first is not None:
            gaps = gaps.mean(1)
        return -_mean_of_easy(gaps.log1p() if self._log else gaps, self._easy_first, view.progress)


@TERMS.register("decision_gap")
class DecisionGap(Term):
    """Negative divergence KL(teacher || student) of those images that both decide alike.

    Nats, a mean over all N images, to which one that they decide differently adds nothing, not even a gradient: it
    has gone far enough. In (-inf, 0]. Source: Fang et al. 2021 (CMI), the adversarial term of the released code. With
    ``where: everywhere`` every image counts: Micaelli and Storkey 2019 (ZSKT).

    Args:
        where: alike, or everywhere.
        temperature: divides both logits; the divergence is not multiplied by its square.
        easy_first: divergence beyond which an image counts for nothing, as of logit_gap.
    """

    needs = frozenset({Need.STUDENT})

    def __init__(
        self,
        *,
        where: Literal["alike", "everywhere"] = "alike",
        temperature: PositiveFloat = 1.0,
        easy_first: Ramp | None = None,
    ) -> None:
        super().__init__()
        self._where = where
        self._temperature = temperature
        self._easy_first = _checked(easy_first)

    @override
    def forward(self, view: View) -> Tensor:
        student, teacher = (logits / self._temperature for logits in _logits(view))
        gaps = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="none").sum(1)
        if self._where == "alike":
            gaps = torch.where(student.argmax(1) == teacher.argmax(1), gaps, 0)
        return -_mean_of_easy(gaps, self._easy_first, view.progress)


def _standardized(logits: Tensor) -> Tensor:
    """Logits [N, K] with mean 0 and standard deviation 1 in each row; 0 where they are all alike."""
    var, mean = torch.var_mean(logits, 1, correction=0, keepdim=True)
    return (logits - mean) * (var + 1e-12).rsqrt()


def _checked(ramp: Ramp | None) -> Ramp | None:
    if ramp is not None and (min(ramp.start, ramp.to) < 0 or max(ramp.start, ramp.to) == 0):
        raise ValueError(
            f"easy_first goes from {ramp.start} to {ramp.to}, but gaps are not negative, so no image would be easy; "
            "give gaps from 0 up"
        )
    return ramp


def _mean_of_easy(gaps: Tensor, threshold: Ramp | None, progress: float) -> Tensor:
    """The mean of ``gaps``, to which those beyond the threshold of this progress add nothing."""
    if threshold is None:
        return gaps.mean()
    return torch.where(gaps <= threshold.at(progress), gaps, 0).mean()


def _logits(view: View) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's."""
    assert view.student is not None, "a comparison needs the student"
    return view.student.logits, view.teacher.logits
