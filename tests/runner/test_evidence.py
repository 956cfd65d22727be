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
from raydfkd.runner.evidence import evidence

KINDS = ("drawn", "pixels", "generated", "mixed")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    for steps in ("PIXEL_STEPS", "GENERATOR_STEPS", "RENEWAL_STEPS"):
        monkeypatch.setattr(module, steps, 3)


@pytest.fixture
def pair(tmp_path):
    recipe = toy_recipe(tmp_path)
    teacher = open_teacher(recipe).module
    return recipe, teacher


def test_student_that_is_the_teacher_agrees_everywhere(pair):
    recipe, teacher = pair
    found = evidence(recipe, teacher, copy.deepcopy(teacher))
    assert found.keys() == {
        name for kind in KINDS for name in (kind, f"{kind}_moved", f"steady_{kind}", f"sure_{kind}")
    }
    assert all(found[name] == 1 for kind in KINDS for name in (kind, f"{kind}_moved"))
    assert all(0.25 <= found[f"sure_{kind}"] <= 1 for kind in KINDS)
    assert any(found[f"steady_{kind}"] < 1 for kind in KINDS), "not all answers outlast the move"


def test_student_that_always_gives_one_class_agrees_where_the_teacher_gives_it(pair):
    recipe, teacher = pair

    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, images):
            return torch.eye(4)[torch.full((len(images),), 2)]

    found = evidence(recipe, teacher, Stubborn())
    images = dict(module._kinds(recipe, teacher))
    for kind, shown in images.items():
        answers = module._answers(recipe, teacher, shown).argmax(1)
        assert found[kind] == pytest.approx((answers == 2).float().mean().item(), abs=1e-4)


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
    evidence(recipe, teacher, student)
    assert student.training
    for network, state in zip((teacher, student), before, strict=True):
        assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
