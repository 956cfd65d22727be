"""The best of a training's students is the result, where the recipe wants that."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from toy import quiet_events, synthesize_here, toy_recipe

from raydfkd.distillation.selection import StudentSelection
from raydfkd.distillation.trainer import TrainingHooks, ignore
from raydfkd.distillation.training import StudentTraining
from raydfkd.errors import RecipeError
from raydfkd.job import open_job
from raydfkd.networks.build import build_network
from raydfkd.networks.teacher import open_teacher
from raydfkd.runner import local
from raydfkd.runner.check import check
from raydfkd.runner.estimate import judge_of
from raydfkd.runner.run import run

SELECT = ("distill.select=estimate", "distill.steps=12", "distill.publish_every=2", "distill.holdout=0")


class ScriptedJudge:
    """Scores students by a list and keeps copies of them."""

    def __init__(self, scores):
        self.scores, self.seen = list(scores), []

    def __call__(self, student):
        self.seen.append({name: value.clone() for name, value in student.state_dict().items()})
        return self.scores[len(self.seen) - 1]


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def training_of(job, judge, **hooks):
    hooks = TrainingHooks(**{"on_log": ignore, **hooks})
    return StudentTraining(job, open_teacher(job.recipe), job.phases[0], hooks=hooks, judge=judge)


@pytest.fixture
def job(tmp_path):
    """A job whose images are there."""
    recipe = toy_recipe(tmp_path, SELECT)
    job = open_job(recipe, open_teacher(recipe))
    synthesize_here(job, quiet_events(tmp_path))
    return job


def test_best_is_held_and_of_equals_the_later():
    judge = ScriptedJudge([0.5, 0.9, 0.9, 0.7])
    selection, student = StudentSelection(judge), torch.nn.Linear(1, 1)
    for value in range(4):
        torch.nn.init.constant_(student.weight, value)
        selection.look(student)
    selection.restore(student)
    assert student.weight.item() == 2
    other = StudentSelection(judge)
    other.load_state_dict(selection.state_dict())
    torch.nn.init.constant_(student.weight, 9)
    other.restore(student)
    assert student.weight.item() == 2


@pytest.mark.parametrize("best", [0, 2, 3])
def test_versions_of_the_second_half_are_looked_at_and_the_best_is_saved(tmp_path, monkeypatch, best):
    judge = ScriptedJudge([1.0 if index == best else 0.5 for index in range(4)])
    monkeypatch.setattr(local, "judge_of", lambda recipe, teacher: judge)
    result = run(toy_recipe(tmp_path, SELECT))
    assert len(judge.seen) == 4, "after 6, 8, 10 and 12 steps"
    assert_same(load_file(result.student), judge.seen[best])


def test_training_that_is_interrupted_ends_with_the_same_student(job):
    whole = training_of(job, ScriptedJudge([0.4, 0.9, 0.3, 0.2])).run()
    states = []

    class Stop(Exception):
        pass

    def stop(state):
        states.append(state)
        raise Stop

    with pytest.raises(Stop):
        training_of(
            job, ScriptedJudge([0.4, 0.9]), on_checkpoint=stop, wants_checkpoint=iter([False] * 8 + [True]).__next__
        ).run()
    resumed = training_of(job, ScriptedJudge([0.3, 0.2]))
    resumed.load_state_dict(states[0])
    assert_same(resumed.run(), whole)


def test_judge_is_the_evidence_and_does_not_change_the_training(tmp_path, job, short_evidence):
    recipe = job.recipe
    teacher = open_teacher(recipe).module
    judge = judge_of(recipe, teacher)
    student = build_network(recipe.student, recipe.teacher, where="student", seed=0)
    assert judge(teacher) == 1
    assert judge(student) < 0.8
    published = {name: [] for name in ("judged", "plain")}
    for name, one in (("judged", judge), ("plain", None)):
        keep = published[name]
        training_of(
            job, one, on_publish=lambda step, state, keep=keep: keep.append({k: v.clone() for k, v in state.items()})
        ).run()
    for judged, plain in zip(published["judged"][:-1], published["plain"][:-1], strict=True):
        assert_same(judged, plain)
    assert judge_of(toy_recipe(tmp_path / "last"), teacher) is None


def test_teacher_that_no_generator_suits_is_refused_before_work(tmp_path):
    recipe = toy_recipe(tmp_path, ["distill.select=estimate"])
    space = recipe.teacher.image_space.model_copy(update={"size": 10})
    odd = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"image_space": space})})
    with pytest.raises(RecipeError, match="distill.select is estimate, for which a generator has to suit .*; use last"):
        check(odd)
