from __future__ import annotations

import itertools

import pytest
from toy import toy_recipe

import raydfkd.runner.budget
from raydfkd.errors import RecipeError
from raydfkd.runner.budget import _Pieces, run_within
from raydfkd.synthesis.student_feed import StoredStudentFeed


@pytest.fixture
def ticks(monkeypatch):
    """A clock that moves by a second whenever it is read."""
    count = itertools.count()
    monkeypatch.setattr(raydfkd.runner.budget, "device_clock", lambda device: lambda: float(next(count)))


WHOLE = ["transfer_set.unit.classes=4", "transfer_set.unit.images_per_class=6", "synthesis.emissions=1"]
"""Units of all classes: three batches of two images of each."""


@pytest.mark.parametrize(("budget", "images"), [(12.0, 4), (20.0, 8), (24.0, 10), (40.0, 18)])
def test_the_set_ends_with_the_batch_that_is_nearest_to_its_share_of_the_budget(tmp_path, ticks, budget, images):
    recipe = toy_recipe(tmp_path, [*WHOLE, "budget.synthesis_share=0.25"], synthesizer="generator")
    outcome = run_within(recipe, budget)
    assert outcome.images == 4 * images
    assert outcome.recipe.transfer_set.images_per_class == images


def test_larger_budgets_buy_more_images_although_a_unit_is_more_than_either_pays_for(tmp_path, ticks):
    bought = [
        run_within(toy_recipe(tmp_path / f"{budget:g}", WHOLE, synthesizer="generator"), budget).images
        for budget in (4.0, 6.0)
    ]
    assert bought[0] < bought[1] < 4 * 6


def test_units_of_some_classes_are_made_until_all_classes_have_their_images(tmp_path, ticks):
    outcome = run_within(toy_recipe(tmp_path, synthesizer="generator"), 0.1)
    assert outcome.images == 4 * 3


def test_training_ends_with_its_schedule_when_the_time_is_over_however_many_steps_that_is(tmp_path, ticks):
    recipe = toy_recipe(tmp_path, ["distill.steps=5"], synthesizer="generator")
    outcome = run_within(recipe, 40.0)
    assert outcome.student_steps == outcome.recipe.distill.steps > 5
    assert outcome.seconds == pytest.approx(40, abs=1.5)
    assert outcome.student.is_file()


def test_one_round_and_one_step_are_made_however_short_the_budget(tmp_path, ticks):
    outcome = run_within(toy_recipe(tmp_path, WHOLE, synthesizer="generator"), 0.1)
    assert (outcome.images, outcome.student_steps) == (4 * 2, 1)
    assert outcome.seconds > 0.1, "an overdrawn budget is reported as such"


def test_a_long_piece_is_not_begun_where_it_took_too_long_in_the_unit_before():
    times = iter([0, 1, 9, 10, 11])  # of a unit, a short piece and a long one; of the next one, a short one
    pieces = _Pieces(lambda: next(times))
    pieces.begin_round()
    pieces.begin_unit()
    assert [pieces.end(6), pieces.end(6)] == [False, True]
    pieces.begin_round()
    pieces.begin_unit()
    assert pieces.end(14), "eight seconds more would end at 19, five too late"


def test_a_budget_is_kept_by_the_real_clock(tmp_path):
    outcome = run_within(toy_recipe(tmp_path, WHOLE, synthesizer="generator"), 2.0)
    assert outcome.seconds == pytest.approx(2.0, abs=0.3)
    assert outcome.wall_seconds > 0


LIVE = (
    "distill.source={kind: live, generator_steps: 1, student_steps: 3, keep: 10}",
    "synthesis.objective=[one_hot, logit_gap]",
    "synthesis.targets=none",
    "transfer_set.images_per_class=0",
)
AGAINST_STUDENT = "synthesis.objective=[cross_entropy, {term: competition, weight: 5}]"


def test_rounds_share_out_a_budget_and_the_second_asks_the_student_of_the_first(tmp_path, ticks, monkeypatch):
    asked = []
    followed = StoredStudentFeed.follow

    def follow(feed, source):
        asked.append(None if source is None else source(-1)[0])
        followed(feed, source)

    monkeypatch.setattr(StoredStudentFeed, "follow", follow)
    settings = [*WHOLE, "rounds=2", "transfer_set.images_per_class=12", AGAINST_STUDENT, "distill.steps=7"]
    outcome = run_within(toy_recipe(tmp_path, settings, synthesizer="generator"), 60.0)
    assert asked[0] is None
    assert 7 < asked[1] < asked[2] == outcome.student_steps, "more steps than the schedule has places"
    assert 4 < outcome.synthesis_seconds < outcome.seconds
    assert outcome.seconds == pytest.approx(60, abs=2)


def test_a_live_source_has_all_of_the_budget(tmp_path, ticks):
    settings = [*LIVE, "distill.steps=5", "distill.batch_size=8"]
    outcome = run_within(toy_recipe(tmp_path, settings, synthesizer="generator"), 40.0)
    assert outcome.synthesis_seconds == 0
    assert outcome.student_steps > 5
    assert outcome.images == 8 * outcome.student_steps


def test_a_student_that_nobody_trains_in_time_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="trained after the synthesis; use rounds: 2"):
        run_within(toy_recipe(tmp_path, [*WHOLE, AGAINST_STUDENT], synthesizer="generator"), 2.0)


def test_a_synthesis_that_comes_to_nothing_is_told_in_a_line(tmp_path):
    with pytest.raises(RecipeError, match="unit r000-c0000-0003 came to nothing.*lower synthesis.lr"):
        run_within(toy_recipe(tmp_path, [*WHOLE, "synthesis.lr=1e30"], synthesizer="generator"), 2.0)
