from __future__ import annotations

import itertools

import pytest
from toy import quiet_events, toy_recipe

import raydfkd.runner.budget
from raydfkd.runner.budget import PROBE_STEPS, run_within


@pytest.fixture
def ticks(monkeypatch):
    """A clock that moves by a second whenever it is read."""
    count = itertools.count()
    monkeypatch.setattr(raydfkd.runner.budget, "device_clock", lambda device: lambda: float(next(count)))


def test_a_budget_is_shared_between_whole_rounds_and_student_steps(tmp_path, ticks):
    recipe = toy_recipe(tmp_path, ["budget.synthesis_share=0.25"], synthesizer="generator")
    with quiet_events(tmp_path) as monitor:
        outcome = run_within(recipe, 20.0, monitor=monitor)
    assert outcome.images == 5 * 4 * 3, "a round took one second, so five of them fit into a quarter of twenty"
    assert outcome.synthesis_seconds == 2
    steps = int((20 - 6) * 0.97 / (1 / PROBE_STEPS))
    assert outcome.student_steps == outcome.recipe.distill.steps == steps
    assert outcome.recipe.transfer_set.images_per_class == 15
    assert outcome.student.is_file()


def test_one_round_and_one_step_are_made_however_short_the_budget(tmp_path, ticks):
    recipe = toy_recipe(tmp_path, synthesizer="generator")
    with quiet_events(tmp_path) as monitor:
        outcome = run_within(recipe, 0.1, monitor=monitor)
    assert (outcome.images, outcome.student_steps) == (4 * 3, 1)
    assert outcome.seconds > 0.1, "an overdrawn budget is reported as such"
