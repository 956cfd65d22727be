"""Time on this machine, foretold from some steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from toy import toy_recipe

from raydfkd.errors import RecipeError
from raydfkd.runner import here
from raydfkd.runner.here import time_here
from raydfkd.runner.trials import parts_of


def looks() -> Callable[[], float]:
    """A clock that is a second later whenever it is looked at: a step takes one, and so does a run's beginning.

    A run of several stages makes one batch, other runs make two.
    """
    return itertools.count(0.0).__next__


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        (["synthesis.stages=[{pool: 2, steps: 3}, {steps: 40}]"], 2 * (3 + 40) + 2),
        (["synthesis.stages=[{steps: 1}]"], 2 * 1 + 2 / 2),
        (["synthesis.select={kind: random, candidates: 2}", "synthesis.stages=[{steps: 50}]"], 3 * 50 + 3 / 2),
    ],
    ids=["stages", "one-step", "candidates"],
)
def test_unit_takes_its_steps_and_a_beginning_for_each_run(tmp_path, changes, seconds):
    assert time_here(toy_recipe(tmp_path, changes), 50, clock=looks()).unit_s == pytest.approx(seconds)


def test_drawn_batch_counts_as_a_step(tmp_path):
    drawn = {"synthesizer": "noise_images", "batch_size": 2, "targets": "none"}
    recipe = toy_recipe(tmp_path).with_synthesis(drawn)
    assert time_here(recipe, 50, clock=looks()).unit_s == pytest.approx(3 + 3 / 2)


def test_renewed_generator_takes_its_steps_for_each_batch(tmp_path):
    unit = ["transfer_set.unit={classes: 2, images_per_class: 8}", "transfer_set.images_per_class=8"]
    renewed = ["synthesis.steps=60", "synthesis.renewal={steps: 20}", "synthesis.emissions=1"]
    recipe = toy_recipe(tmp_path, [*unit, *renewed], synthesizer="generator")
    (part,) = parts_of(recipe)
    assert (part.batches, part.steps_of(part.batches)) == (4, [60 + 3 * 20])
    assert time_here(recipe, 50, clock=looks()).unit_s == pytest.approx(60 + 3 * 20, rel=0.05)


def test_step_of_the_student_is_timed_from_batch_to_batch(tmp_path):
    assert time_here(toy_recipe(tmp_path), 30, clock=looks()).student_step_s == 1


def test_batches_that_would_take_too_long_are_timed_by_few_images(tmp_path, monkeypatch):
    sizes = ["transfer_set.unit={classes: 2, images_per_class: 32}", "transfer_set.images_per_class=32"]
    recipe = toy_recipe(tmp_path, [*sizes, "synthesis.batch_size=64", "distill.batch_size=64"])
    sizes, run = [], here._Trials._run

    def noted(trials, synthesizer, request):
        sizes.append(request.count)
        return run(trials, synthesizer, request)

    monkeypatch.setattr(here._Trials, "_run", noted)
    found = time_here(recipe, 0, clock=looks())
    assert set(sizes) == {2 * here.FEW}
    assert found.unit_s == pytest.approx(64 / (2 * here.FEW) * (2 + 2 + 1)), "in proportion to images"
    assert found.student_step_s == 64 / here.FEW**2


def test_seconds_on_this_machine_are_more_than_none_and_its_memory_is_known(tmp_path):
    found = time_here(toy_recipe(tmp_path), 0.2)
    assert 0 < found.unit_s < 60
    assert 0 < found.student_step_s < 60
    assert found.memory_gib > 0.5


def test_device_that_is_not_there_is_a_mistake(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    recipe = toy_recipe(tmp_path)
    recipe = recipe.model_copy(update={"runtime": recipe.runtime.model_copy(update={"device": "cuda"})})
    with pytest.raises(RecipeError, match=r"runtime\.device is 'cuda', but this machine has no CUDA device"):
        time_here(recipe, 1)
