"""What the agreement of student and teacher on real images is likely to be, where there are none."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

from torch import nn

from raydfkd.config.recipe import Recipe
from raydfkd.distillation.selection import JudgeStudent
from raydfkd.errors import RecipeError
from raydfkd.networks.observed import frozen_copy
from raydfkd.runner.evidence import SHARES, Evidence
from raydfkd.synthesis.judge import ObjectiveNotFiniteError

CALIBRATION = Path(__file__).parent / "calibration.json"
EDGE = 0.02
"""Shares closer than this to 0 or 1 count as this far from it: a few hundred images do not tell them apart."""
SLACK = 0.1
"""How far a share may lie outside those that were calibrated."""
REACH = 1.75
"""How many times more or fewer classes or pixels a teacher may have than those that were calibrated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How evidence and agreement on real images went together where both were measured.

    The agreement above chance follows from the evidence's ``midst``, on a line in log-odds.
    """

    slope: float
    intercept: float
    low: float
    """Log-odds by which nineteen of twenty agreements are at most below the estimate."""
    high: float
    """The same above it."""
    ranges: Mapping[str, tuple[float, float]]
    """Least and largest value that was seen: what evidence says of teachers, ``classes`` and the shorter ``edge``."""
    measured: Mapping[str, Any]
    """What it rests on and how far off it was on teachers that it was not fitted to; see ``bench.calibration``."""

    @classmethod
    def read(cls, path: Path = CALIBRATION) -> Self:
        """The packaged one, unless another is named."""
        return cls(**json.loads(path.read_bytes()))

    def estimate(self, found: Mapping[str, float], classes: int) -> tuple[float, float, float]:
        """The agreement that evidence speaks for, and the bounds of its interval; shares."""
        middle = self.intercept + self.slope * log_odds(midst(found, classes))
        agreement, low, high = (
            with_chance(share_of(odds), classes) for odds in (middle, middle - self.low, middle + self.high)
        )
        return agreement, low, high

    def strange(self, found: Mapping[str, float]) -> str | None:
        """What lies outside all that was calibrated, in words; None where nothing does."""
        for name, (least, most) in self.ranges.items():
            if name in found and not least - SLACK <= found[name] <= most + SLACK:
                what, kind = name.split("_")
                says = {
                    "steady": f"the teacher gives {found[name]:.0%} of {kind} images the class of their moved copies",
                    "sure": f"the teacher is {found[name]:.0%} sure of {kind} images",
                }
                return f"{says[what]}, which was {least:.0%} to {most:.0%} wherever this was calibrated"
        return None

    def out_of_reach(self, recipe: Recipe) -> str | None:
        """Why no teacher of such images was calibrated, in words, before any evidence is collected; else None."""
        space = recipe.teacher.image_space
        given = {"classes": recipe.teacher.classes, "edge": min(space.height, space.width)}
        for name, value in given.items():
            least, most = self.ranges[name]
            if not least / REACH <= value <= most * REACH:
                what = "classes" if name == "classes" else "pixels of the shorter edge"
                return f"the teacher has {value} {what}, those that this was calibrated on {least:.0f} to {most:.0f}"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The likely share of real images that student and teacher put in the same class, or why nobody can say."""

    agreement: float | None
    """None where the evidence is outside what was calibrated."""
    low: float | None
    """Bounds within which nine of ten agreements are."""
    high: float | None
    words: str
    """What it rests on, or why it is unknown: a sentence without its full stop."""
    evidence: Mapping[str, float]
    """See ``runner.evidence``; empty where none was collected."""

    @classmethod
    def unknown(cls, why: str, found: Mapping[str, float] | None = None) -> Self:
        """No estimate, for a reason."""
        return cls(agreement=None, low=None, high=None, words=why, evidence=found or {})

    def as_json(self) -> dict[str, Any]:
        """As report.json has it; shares are rounded as far as they are known."""
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()}


def estimate(recipe: Recipe, teacher: nn.Module, student: nn.Module) -> Estimate:
    """Estimate without a real image; takes ten seconds to a minute on a core, for a generator.

    Args:
        recipe: whose image space, classes and seed count.
        teacher: on the device on which both are asked.
        student: on the same one.
    """
    calibration = packaged_calibration()
    if why := calibration.out_of_reach(recipe):
        return Estimate.unknown(why)
    try:
        found = Evidence(recipe, teacher).of(student)
    except (ObjectiveNotFiniteError, RecipeError) as error:
        return Estimate.unknown(f"no images can be made of this teacher that it would rest on ({error})")
    return weighed(calibration, found, recipe.teacher.classes)


def judge_of(recipe: Recipe, teacher: nn.Module) -> JudgeStudent | None:
    """What chooses among the students of a training by the evidence; None where the last is the result.

    The evidence is made when the first student is judged, on its device.
    """
    if recipe.distill.select == "last":
        return None
    made: list[Evidence] = []

    def judge(student: nn.Module) -> float:
        if not made:
            made.append(Evidence(recipe, frozen_copy(teacher).to(next(student.parameters()).device)))
        return midst(made[0].of(student), recipe.teacher.classes)

    return judge


def weighed(calibration: Calibration, found: Mapping[str, float], classes: int) -> Estimate:
    """What the evidence says by a calibration."""
    if why := calibration.strange(found):
        return Estimate.unknown(why, found)
    agreement, low, high = calibration.estimate(found, classes)
    measured = calibration.measured
    error, worst = (round(100 * measured[key]) for key in ("mean_error", "worst_too_high"))
    words = (
        "from the agreement on images that are drawn without the teacher and images that are made of it alone, as "
        f"calibrated on {measured['students']} students of {measured['teachers']} other teachers, where it was off by "
        f"{error} points in the mean, at worst {worst} too high, on teachers that were left out"
    )
    return Estimate(agreement=agreement, low=low, high=high, words=words, evidence=found)


@cache
def packaged_calibration() -> Calibration:
    """The calibration that comes with the package."""
    return Calibration.read()


def midst(found: Mapping[str, float], classes: int) -> float:
    """Geometric mean of the agreements of ``runner.evidence``, above chance."""
    return math.exp(sum(math.log(max(EDGE, above_chance(found[name], classes))) for name in SHARES) / len(SHARES))


def above_chance(agreement: float, classes: int) -> float:
    """An agreement as a share of what guessing among ``classes`` leaves open."""
    return max(0.0, (agreement - 1 / classes) / (1 - 1 / classes))


def with_chance(share: float, classes: int) -> float:
    """The agreement that is this far above chance."""
    return 1 / classes + share * (1 - 1 / classes)


def log_odds(share: float) -> float:
    """Log-odds of a share, which stays ``EDGE`` away from 0 and 1."""
    kept = min(max(share, EDGE), 1 - EDGE)
    return math.log(kept / (1 - kept))


def share_of(odds: float) -> float:
    """The share that has these log-odds."""
    return 1 / (1 + math.exp(-odds))
