"""Fitting the estimate of ``runner.estimate`` to students whose agreement on real images is known."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raydfkd.runner.estimate import EDGE, Calibration, above_chance, log_odds, midst
from raydfkd.runner.evidence import OF_TEACHER

HARM = 3.0
"""How many times more an estimate that is too high counts than one that is too low by as much."""
ROUNDS = 50
"""Of fitting anew with the weights that follow from the fit before."""
TAIL = 0.05
"""Share of the agreements that may lie beyond either end of the interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A student whose agreement on real images is known."""

    teacher: str
    agreement: float
    evidence: Mapping[str, float]
    classes: int
    edge: int

    @property
    def midst(self) -> float:
        """What the evidence comes to, in log-odds."""
        return log_odds(midst(self.evidence, self.classes))

    @property
    def wanted(self) -> float:
        """What it should say, in log-odds above chance."""
        return log_odds(above_chance(self.agreement, self.classes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """How far estimates are off on teachers that they were not fitted to; shares."""

    mean_error: float
    worst_too_high: float
    worst_too_low: float
    rank_correlation: float
    """Spearman's, over all students."""
    inside: float
    """Share of agreements inside their intervals, or as near as images tell shares apart."""
    unknown: float
    """Share of students of which nothing was said; the other figures are of those that were."""


def fit(known: Sequence[Known], *, measured: Mapping[str, Any] | None = None) -> Calibration:
    """Fit the line, and the interval to what lines miss that were fitted without the teacher.

    Args:
        known: students of two teachers at least; each teacher counts the same, however many its students.
        measured: what the calibration says of itself.
    """
    slope, intercept = _line(known)
    misses = []
    for name in _names(known):
        a, b = _line(_without(known, name))
        misses += [one.wanted - (a * one.midst + b) for one in known if one.teacher == name]
    low, high = np.quantile(misses, [TAIL, 1 - TAIL])
    ranges = {name: _range([one.evidence[name] for one in known]) for name in OF_TEACHER}
    return Calibration(
        slope=round(slope, 4),
        intercept=round(intercept, 4),
        low=round(max(0.0, -float(low)), 4),
        high=round(max(0.0, float(high)), 4),
        ranges={
            **ranges,
            "classes": _range([one.classes for one in known]),
            "edge": _range([one.edge for one in known]),
        },
        measured=measured or {},
    )


def cross_validated(known: Sequence[Known]) -> tuple[Accuracy, list[float | None]]:
    """Estimate the students of each teacher from those of all others; returns how good that is, and each estimate."""
    from scipy.stats import spearmanr

    calibrations = {name: fit(_without(known, name)) for name in _names(known)}
    estimates: list[float | None] = []
    inside = []
    for one in known:
        calibration = calibrations[one.teacher]
        if calibration.strange(one.evidence):
            estimates.append(None)
            continue
        estimate, low, high = calibration.estimate(one.evidence, one.classes)
        estimates.append(estimate)
        inside.append(low - EDGE <= one.agreement <= high + EDGE)
    said = [(one.agreement, estimate) for one, estimate in zip(known, estimates, strict=True) if estimate is not None]
    too_high = [estimate - agreement for agreement, estimate in said]
    accuracy = Accuracy(
        mean_error=statistics.mean(map(abs, too_high)),
        worst_too_high=max(0.0, *too_high),
        worst_too_low=max(0.0, *(-miss for miss in too_high)),
        rank_correlation=float(spearmanr(*zip(*said, strict=True)).statistic),
        inside=statistics.mean(inside),
        unknown=1 - len(said) / len(known),
    )
    return accuracy, estimates


def _line(known: Sequence[Known]) -> tuple[float, float]:
    """Slope and intercept of an expectile (Newey & Powell 1987), by least squares whose weights follow the misses."""
    counts = {name: sum(one.teacher == name for one in known) for name in _names(known)}
    shares = np.array([1 / counts[one.teacher] for one in known])
    midsts, wanted = (np.array(values) for values in zip(*((one.midst, one.wanted) for one in known), strict=True))
    rows, weights = np.stack([midsts, np.ones_like(midsts)], axis=1), shares
    for _ in range(ROUNDS):
        root = np.sqrt(weights)
        (slope, intercept), *_ = np.linalg.lstsq(root[:, None] * rows, root * wanted)
        weights = shares * np.where(slope * midsts + intercept > wanted, HARM, 1.0)
    return float(slope), float(intercept)


def _without(known: Sequence[Known], name: str) -> list[Known]:
    return [one for one in known if one.teacher != name]


def _names(known: Sequence[Known]) -> list[str]:
    return list(dict.fromkeys(one.teacher for one in known))


def _range(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)
