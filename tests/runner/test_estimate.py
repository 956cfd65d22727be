"""What is said of the agreement on real images where there are none."""

from __future__ import annotations

import json

import pytest
from toy import toy_recipe

import raydfkd
from raydfkd.networks.teacher import open_teacher
from raydfkd.runner import estimate as module
from raydfkd.runner.estimate import Calibration, log_odds, midst, packaged_calibration, share_of, weighed
from raydfkd.runner.evidence import OF_TEACHER, SHARES

EVIDENCE = {name: 0.8 for name in SHARES} | {name: 0.7 for name in OF_TEACHER}
CALIBRATION = Calibration(
    slope=1.2,
    intercept=-0.2,
    low=1.0,
    high=0.5,
    ranges={"steady_drawn": (0.5, 0.9), "classes": (2, 26), "edge": (8, 32)},
    measured={"students": 50, "teachers": 9, "mean_error": 0.061, "worst_too_high": 0.18},
)


@pytest.fixture
def small(short_evidence, monkeypatch):
    """A calibration that the toy teachers are within, and evidence of few steps."""
    wide = {name: (0.0, 1.0) for name in OF_TEACHER}
    calibration = Calibration(
        **{
            **{key: getattr(CALIBRATION, key) for key in CALIBRATION.__slots__},
            "ranges": {**CALIBRATION.ranges, **wide},
        }
    )
    monkeypatch.setattr(module, "packaged_calibration", lambda: calibration)
    return calibration


def test_midst_is_the_geometric_mean_of_what_is_above_chance():
    assert midst(EVIDENCE, 10) == pytest.approx((0.8 - 0.1) / 0.9)
    assert midst(EVIDENCE, 2) == pytest.approx(0.6)
    uneven = {**EVIDENCE, "drawn": 0.1, "drawn_moved": 0.05}
    assert midst(uneven, 10) == pytest.approx((0.02**2 * (7 / 9) ** 4) ** (1 / 6)), "chance counts as a fiftieth"


def test_estimate_lies_on_the_line_with_its_interval():
    found = weighed(CALIBRATION, EVIDENCE, 10)
    odds = -0.2 + 1.2 * log_odds(7 / 9)
    assert found.agreement == pytest.approx(0.1 + 0.9 * share_of(odds))
    assert found.low == pytest.approx(0.1 + 0.9 * share_of(odds - 1.0))
    assert found.high == pytest.approx(0.1 + 0.9 * share_of(odds + 0.5))
    assert "50 students of 9 other teachers" in found.words
    assert "off by 6 points in the mean, at worst 18 too high" in found.words


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_full_agreement_on_a_few_hundred_images_is_not_certainty(share):
    found = weighed(CALIBRATION, EVIDENCE | {name: share for name in SHARES}, 10)
    assert 0.1 < found.agreement < 1


def test_teacher_that_takes_images_as_none_before_did_is_unknown():
    found = weighed(CALIBRATION, {**EVIDENCE, "steady_drawn": 0.3}, 10)
    assert (found.agreement, found.low, found.high) == (None, None, None)
    assert found.words == (
        "the teacher gives 30% of drawn images the class of their moved copies, which was 50% to 90% wherever this "
        "was calibrated"
    )
    assert found.evidence["steady_drawn"] == 0.3


def test_report_of_a_run_without_real_images_has_the_estimate_and_evaluate_says_the_same(tmp_path, small):
    recipe = toy_recipe(tmp_path)
    report = raydfkd.run(recipe).report
    found = report["student"]["estimate"]
    agreement, low, high = small.estimate(found["evidence"], 4)
    assert (found["agreement"], found["low"], found["high"]) == tuple(
        round(share, 4) for share in (agreement, low, high)
    )
    assert raydfkd.evaluate(recipe)["student"]["estimate"] == found
    written = json.loads((tmp_path / "run" / "report.json").read_text())
    assert written["student"]["estimate"] == found


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        (
            {"classes": (10, 26), "edge": (8, 32)},
            "the teacher has 4 classes, those that this was calibrated on 10 to 26",
        ),
        (
            {"classes": (2, 26), "edge": (28, 32)},
            "the teacher has 8 pixels of the shorter edge, those that this was calibrated on 28 to 32",
        ),
    ],
)
def test_nothing_is_collected_for_teachers_that_nobody_calibrated(tmp_path, monkeypatch, ranges, words):
    recipe = toy_recipe(tmp_path)
    network = open_teacher(recipe).module
    calibration = Calibration(**{key: getattr(CALIBRATION, key) for key in CALIBRATION.__slots__} | {"ranges": ranges})
    monkeypatch.setattr(module, "packaged_calibration", lambda: calibration)
    monkeypatch.setattr(module, "Evidence", None)
    found = module.estimate(recipe, network, network)
    assert (found.agreement, found.words, found.evidence) == (None, words, {})


def test_packaged_calibration_says_what_it_rests_on():
    found = packaged_calibration()
    assert found.slope > 0
    assert found.low > 0
    assert found.high > 0
    assert found.ranges.keys() == {*OF_TEACHER, "classes", "edge"}
    assert found.measured["teachers"] >= 10
    assert found.measured["mean_error"] > 0
