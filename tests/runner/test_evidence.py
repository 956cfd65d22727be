"""Evidence of a student's agreement with its teacher, for which no real image is needed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from toy import toy_recipe

from raydfkd.networks.build import build_network
from raydfkd.networks.teacher import open_teacher
from raydfkd.runner import evidence as module
from raydfkd.runner.evidence import KINDS, OF_TEACHER, SHARES, Evidence


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    for steps in ("GENERATOR_STEPS", "RENEWAL_STEPS"):
        monkeypatch.setattr(module, steps, 3)


@pytest.fixture
def pair(tmp_path):
    recipe = toy_recipe(tmp_path)
    teacher = open_teacher(recipe).module
    return recipe, teacher


def test_student_that_is_the_teacher_agrees_everywhere(pair):
    recipe, teacher = pair
    found = Evidence(recipe, teacher).of(copy.deepcopy(teacher))
    assert found.keys() == {*SHARES, *OF_TEACHER}
    assert all(found[name] == 1 for name in SHARES)
    assert all(0.25 <= found[f"sure_{kind}"] <= 1 for kind in KINDS)
    assert any(found[f"steady_{kind}"] < 1 for kind in KINDS), "not all answers outlast the move"


def test_student_that_always_gives_one_class_agrees_in_one_class_of_those_that_the_teacher_finds(pair):
    recipe, teacher = pair

    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, images):
            return torch.eye(4)[torch.full((len(images),), 2)]

    found = Evidence(recipe, teacher).of(Stubborn())
    images = dict(module._kinds(recipe, teacher))
    for kind, shown in images.items():
        answers = module._answers(recipe, teacher, shown).argmax(1)
        share = (answers == 2).any().item() / len(answers.unique())
        assert found[kind] == pytest.approx(share, abs=1e-4)


def test_firm_images_are_those_whose_moved_copy_the_teacher_takes_for_the_same(pair, monkeypatch):
    recipe, teacher = pair
    shown = torch.randint(256, (6, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows = {"shown": [0, 0, 1, 1, 2, 2], "moved": [0, 1, 1, 0, 2, 2], "student": [0, 1, 1, 1, 3, 2]}
    answers = iter(["shown", "moved", "student", "student"])
    monkeypatch.setattr(module, "_kinds", lambda recipe, teacher: iter([("drawn", shown)]))
    monkeypatch.setattr(module, "_answers", lambda *_: torch.eye(4)[rows[next(answers)]])
    found = Evidence(recipe, teacher).of(teacher)
    assert found["drawn"] == pytest.approx((0.5 + 1 + 0.5) / 3, abs=1e-4)
    assert found["drawn_firm"] == pytest.approx((1 + 1 + 0.5) / 3, abs=1e-4), "of images 0, 2, 4 and 5"
    assert found["steady_drawn"] == pytest.approx(4 / 6, abs=1e-4)


def test_images_follow_from_teacher_and_seed_and_not_from_the_students_recipe(pair):
    recipe, teacher = pair
    first = dict(module._kinds(recipe, teacher))
    other = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"steps": 99}), "name": "other"})
    again = dict(module._kinds(other, teacher))
    assert all(torch.equal(first[kind], again[kind]) for kind in KINDS)
    reseeded = dict(module._kinds(recipe.model_copy(update={"seed": 8}), teacher))
    assert not any(torch.equal(first[kind], reseeded[kind]) for kind in KINDS)
    assert all(images.dtype == torch.uint8 and images.shape[1:] == (1, 8, 8) for images in first.values())


def test_both_networks_are_left_as_they_were(pair):
    recipe, teacher = pair
    student = build_network(recipe.student, recipe.teacher, where="student", seed=0).train()
    before = [copy.deepcopy(network.state_dict()) for network in (teacher, student)]
    Evidence(recipe, teacher).of(student)
    assert student.training
    for network, state in zip((teacher, student), before, strict=True):
        assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())


def test_recipe_whose_last_unit_the_clock_has_cut_short_has_the_same_evidence(pair):
    recipe, teacher = pair
    cut = recipe.model_copy(update={"transfer_set": recipe.transfer_set.model_copy(update={"images_per_class": 5})})
    student = build_network(recipe.student, recipe.teacher, where="student", seed=0)
    assert Evidence(cut, teacher).of(student) == Evidence(recipe, teacher).of(student)
