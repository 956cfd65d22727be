"""Short heats: half of the methods go on, judged by evidence alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from toy import toy_recipe

from raydfkd.errors import RecipeError
from raydfkd.networks.build import build_network
from raydfkd.networks.teacher import open_teacher
from raydfkd.runner import heats as module
from raydfkd.runner.budget import Outcome
from raydfkd.runner.heats import heats, rounds_of


@pytest.fixture
def raced(tmp_path, short_evidence, monkeypatch):
    """Lets methods of known quality run: students that are the teacher but for some noise; returns who ran when."""
    recipe = toy_recipe(tmp_path)
    network = recipe.teacher.network
    recipe = recipe.model_copy(
        update={"student": recipe.student.model_copy(update={"network": network, "options": recipe.teacher.options})}
    )
    teacher = open_teacher(recipe).module

    def race(noises, seconds=100.0):
        ran = []

        def run_within(recipe, seconds):
            ran.append((recipe.name, seconds))
            noise = noises[recipe.name]
            if noise is None:
                raise RecipeError("synthesis: came to nothing")
            student = build_network(recipe.student, recipe.teacher, where="student", seed=0)
            rng = torch.Generator().manual_seed(1)
            state = {
                name: value + noise * torch.randn(value.shape, generator=rng) if value.is_floating_point() else value
                for name, value in teacher.state_dict().items()
            }
            student.load_state_dict(state)
            path = Path(recipe.run_dir, "student.safetensors")
            save_file({name: value.contiguous() for name, value in student.state_dict().items()}, path)
            return replace(OUTCOME, recipe=recipe, student=path, seconds=seconds)

        monkeypatch.setattr(module, "run_within", run_within)
        recipes = {name: recipe.model_copy(update={"name": name}) for name in noises}
        told = []
        return heats(recipes, seconds, told=told.append), ran, told

    return race


OUTCOME = Outcome(
    recipe=None, student=Path(), images=8, student_steps=4, synthesis_seconds=1.0, seconds=2.0, wall_seconds=2.0
)


def test_rounds_take_the_same_time_and_half_go_on():
    assert rounds_of(5, 300) == [(5, 20.0), (3, pytest.approx(100 / 3)), (2, 50.0)]
    assert rounds_of(2, 60) == [(2, 30.0)]
    assert rounds_of(1, 60) == [(1, 60.0)]


def test_too_little_time_is_refused_and_says_how_much_is_enough():
    with pytest.raises(RecipeError, match="leaves 2.0 s to each of 5 methods; give 75s or fewer methods"):
        rounds_of(5, 30)


def test_the_best_by_the_evidence_wins_and_the_worst_run_once(raced):
    best, ran, told = raced({"bad": 5.0, "good": 0.0, "fair": 0.01, "awful": 20.0})
    assert best == "good"
    assert ran[:4] == [(name, 12.5) for name in ("bad", "good", "fair", "awful")]
    assert ran[4:] == [("good", 25.0), ("fair", 25.0)]
    of_good = [heat for heat in told if heat.method == "good"]
    assert [heat.midst for heat in of_good] == [1, 1]
    assert all(heat.midst < 1 for heat in told if heat.method in ("bad", "awful"))


def test_method_that_comes_to_nothing_does_not_end_the_heats(raced):
    best, _, told = raced({"broken": None, "fair": 0.1})
    assert best == "fair"
    assert told[0].estimate.words == "synthesis: came to nothing"
    with pytest.raises(RecipeError, match="every method came to nothing: synthesis: came to nothing"):
        raced({"broken": None, "also": None})
