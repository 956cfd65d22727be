"""The estimate's calibration: it finds what agreement follows from, and says how far off it is elsewhere."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from raydfkd.bench.calibration import Known, cross_validated, fit
from raydfkd.runner.estimate import above_chance, log_odds, midst, share_of, with_chance
from raydfkd.runner.evidence import OF_TEACHER, SHARES


def students(teachers=6, each=5, noise=0.0, slope=1.0, intercept=0.0, classes=10, seed=0):
    """Students whose agreement follows from the midst of their evidence, on a line in log-odds."""
    rng = random.Random(seed)
    found = []
    for teacher in range(teachers):
        for _ in range(each):
            level = rng.uniform(0.62, 0.93)
            evidence = {name: level + rng.uniform(-0.02, 0.02) for name in SHARES} | {name: 0.8 for name in OF_TEACHER}
            odds = intercept + slope * log_odds(midst(evidence, classes)) + rng.gauss(0, noise)
            agreement = with_chance(share_of(odds), classes)
            found.append(Known(teacher=f"t{teacher}", agreement=agreement, evidence=evidence, classes=classes, edge=28))
    return found


@pytest.mark.parametrize("classes", [2, 10])
def test_line_that_agreement_follows_is_found(classes):
    known = students(slope=1.4, intercept=-0.5, classes=classes)
    calibration = fit(known)
    assert calibration.slope == pytest.approx(1.4, abs=1e-3)
    assert calibration.intercept == pytest.approx(-0.5, abs=1e-3)
    for one in known:
        estimate, low, high = calibration.estimate(one.evidence, classes)
        assert estimate == pytest.approx(low, abs=1e-3) == pytest.approx(high, abs=1e-3)
        assert estimate == pytest.approx(one.agreement, abs=2e-3)


def test_each_teacher_is_estimated_by_the_others_alone():
    known = students(each=20)
    odd = [replace(one, agreement=1.1 - one.agreement) for one in known if one.teacher == "t0"]
    rest = [one for one in known if one.teacher != "t0"]
    _, estimates = cross_validated([*odd, *rest])
    expected = fit(rest)
    assert estimates[:20] == [expected.estimate(one.evidence, 10)[0] for one in odd]


def test_accuracy_is_what_the_estimates_come_to():
    known = students(each=20, noise=0.3)
    accuracy, estimates = cross_validated(known)
    misses = [estimate - one.agreement for one, estimate in zip(known, estimates, strict=True)]
    assert accuracy.mean_error == pytest.approx(sum(map(abs, misses)) / len(misses))
    assert accuracy.worst_too_high == max(misses)
    assert accuracy.worst_too_low == -min(misses)
    assert accuracy.rank_correlation > 0.8
    assert 0.85 <= accuracy.inside <= 0.97, "nine of ten, on teachers that were left out"
    assert accuracy.unknown == 0


def test_an_estimate_that_is_too_high_counts_thrice():
    evidence = {name: 0.8 for name in SHARES} | {name: 0.8 for name in OF_TEACHER}
    known = [
        Known(teacher=f"t{index}", agreement=agreement, evidence=evidence, classes=10, edge=28)
        for index, agreement in enumerate([0.5, 0.9, 0.5, 0.9])
    ]
    odds = [one.wanted for one in known]
    estimate, *_ = fit(known).estimate(evidence, 10)
    assert log_odds(above_chance(estimate, 10)) == pytest.approx((3 * odds[0] + odds[1]) / 4, abs=1e-3)


def test_nothing_is_said_of_a_teacher_unlike_all_others():
    known = students()
    odd = [
        replace(one, evidence={**one.evidence, "steady_drawn": 0.1}) if one.teacher == "t0" else one for one in known
    ]
    accuracy, estimates = cross_validated(odd)
    assert {one.teacher for one, estimate in zip(odd, estimates, strict=True) if estimate is None} == {"t0"}
    assert accuracy.unknown == pytest.approx(1 / 6)


def test_a_teacher_with_more_students_counts_no_more():
    few = [one for one in students(each=10) if one.teacher == "t0"]
    many = [one for one in students(each=10, intercept=-2) if one.teacher == "t1"]
    assert fit([*few, *many]).intercept == pytest.approx(fit([*few, *many, *many, *many]).intercept, abs=0.01)
