"""An estimate of how often a student agrees with its teacher on real images, from evidence that needs none."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

CALIBRATION = Path(__file__).with_name("calibration.json")
"""Written by `tests/report/calibrate.py` from the figures of the zoo."""
LOWEST, HIGHEST = 0.01, 0.995
"""Agreements beyond these count as these: a share of some hundred images says no more."""
SLACK = 0.05
"""How far a share may lie outside those that were calibrated on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What the zoo has taught: a weighted sum of log-odds."""

    weights: Mapping[str, float]
    """By name of the evidence; none below zero, so that more agreement never lowers the estimate."""
    bias: float
    below: float
    above: float
    """Log-odds from the estimate down and up to the ends of the interval, 90 % of the zoo's cells between them."""
    ranges: Mapping[str, tuple[float, float]]
    """Least and largest of each share that says what the teacher is like on such images."""
    cells: int
    """Students that it was learned from."""
    teachers: int
    """Teachers of those."""
    error: float
    """Mean absolute error, 0 to 1, each teacher's cells estimated from those of all others."""

    def log_odds(self, evidence: Mapping[str, float]) -> float:
        """The estimate's."""
        return self.bias + sum(weight * log_odds(evidence[name]) for name, weight in self.weights.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A share between 0 and 1 with its interval, or why there is none."""

    agreement: float | None
    low: float | None
    high: float | None
    rests_on: str
    """In words for people: what it was estimated from, or why it is unknown."""

    def as_data(self) -> dict[str, Any]:
        """As report.json has it."""
        return asdict(self)


def unknown(why: str) -> Estimate:
    """No estimate, and why."""
    return Estimate(agreement=None, low=None, high=None, rests_on=why)


@cache
def calibration() -> Calibration:
    """The one that comes with raydfkd."""
    data = json.loads(CALIBRATION.read_text(encoding="utf-8"))
    ranges = {name: (low, high) for name, (low, high) in data.pop("ranges").items()}
    return Calibration(ranges=ranges, **data)


def estimate(evidence: Mapping[str, float], known: Calibration | None = None) -> Estimate:
    """The agreement on real images that such ``evidence`` (see ``runner.evidence``) came with in the zoo.

    Args:
        evidence: shares by name.
        known: another calibration than the one that comes with raydfkd.
    """
    known = known or calibration()
    odd = [name for name, (low, high) in known.ranges.items() if not low - SLACK <= evidence[name] <= high + SLACK]
    if odd:
        return unknown(f"the teacher is unlike those of the calibration ({', '.join(odd)})")
    middle = known.log_odds(evidence)
    low, agreement, high = (share(odds) for odds in (middle - known.below, middle, middle + known.above))
    return Estimate(
        agreement=round(agreement, 4),
        low=round(low, 4),
        high=round(high, 4),
        rests_on=f"agreement on {len(known.weights)} kinds of images that are none of the student's own and not real, "
        f"calibrated on {known.cells} students of {known.teachers} teachers, where it was off by "
        f"{100 * known.error:.0f} points in the mean",
    )


def log_odds(value: float) -> float:
    """Logarithm of a share over its rest, within bounds."""
    bounded = min(HIGHEST, max(LOWEST, value))
    return math.log(bounded / (1 - bounded))


def share(odds: float) -> float:
    """The share of such log-odds."""
    return 1 / (1 + math.exp(-odds))
