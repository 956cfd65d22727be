"""What makes a teacher hard to invert is said before any work."""

from __future__ import annotations

import copy

import pytest
import torch
from toy import CLASSES, SPACE, toy_recipe

from raydfkd.config.schema import TeacherSpec
from raydfkd.networks import hardness as hardness_module
from raydfkd.networks.batchnorm import layers_with_statistics
from raydfkd.networks.build import build_network
from raydfkd.networks.hardness import CALM, FEW_BATCHES, NOISE_IMAGES, TOO_SURE, hardness, temperature_for
from raydfkd.networks.teacher import open_teacher
from raydfkd.runner.check import check
from raydfkd.seeds import rng_from

SPEC = TeacherSpec(network="convnet", options={"widths": [8, 12]}, classes=CLASSES, image_space=SPACE)


@pytest.fixture
def teacher():
    """With the statistics of many batches, and sure of nothing in noise."""
    network = build_network(SPEC, SPEC, where="teacher", seed=0)
    for _, layer in layers_with_statistics(network):
        layer.num_batches_tracked.fill_(1000)
    return network.eval()


def test_nothing_is_said_of_a_teacher_that_is_not_hard(teacher):
    before = copy.deepcopy(teacher.state_dict())
    assert hardness(teacher, SPEC) == []
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_teacher_without_batchnorm_is_said_to_be_one():
    spec = TeacherSpec(network="lenet5", classes=CLASSES, image_space=SPACE.model_copy(update={"size": 32}))
    (line,) = hardness(build_network(spec, spec, where="teacher", seed=0), spec)
    assert line.startswith("the teacher has no BatchNorm")
    assert "synthesis.start.images" in line


@pytest.mark.parametrize(("seen", "is_said"), [(1, True), (FEW_BATCHES - 1, True), (FEW_BATCHES, False), (0, False)])
def test_statistics_of_a_handful_of_batches_are_said_to_be_that(teacher, seen, is_said):
    layers_with_statistics(teacher)[0][1].num_batches_tracked.fill_(seen)
    lines = hardness(teacher, SPEC)
    assert len(lines) == is_said
    assert all(f"of {seen} batches, too few" in line for line in lines)


def test_statistics_that_are_averaged_over_all_batches_are_not_too_few(teacher):
    for _, layer in layers_with_statistics(teacher):
        layer.momentum = None
        layer.num_batches_tracked.fill_(3)
    assert hardness(teacher, SPEC) == []


@torch.no_grad()
def confidence_in_noise(network):
    """With BatchNorm by the noise's own moments."""
    noise = torch.randn(NOISE_IMAGES, *SPACE.shape, generator=rng_from(0))
    return copy.deepcopy(network).train()(noise).softmax(1).amax(1).median().item()


@pytest.mark.parametrize("loudness", [1.0, 10_000.0])
def test_teacher_that_is_sure_of_noise_is_said_to_be_with_how_sure(teacher, loudness):
    with torch.no_grad():
        teacher.head.weight.mul_(loudness)
    confidence = confidence_in_noise(teacher)
    lines = hardness(teacher, SPEC)
    assert len(lines) == (confidence > TOO_SURE) == (loudness > 1)
    assert all(f"{confidence:.1%} sure of what it sees in noise" in line for line in lines)


def test_teacher_is_calm_with_the_temperature_that_is_found_for_it(teacher):
    assert temperature_for(teacher, SPEC) == 1
    with torch.no_grad():
        teacher.head.weight.mul_(10_000)
    temperature = temperature_for(teacher, SPEC)
    (line,) = hardness(teacher, SPEC)
    assert f"set teacher.temperature: {temperature:.2g}, as" in line
    calm = SPEC.model_copy(update={"temperature": temperature})
    network = build_network(calm, calm, where="teacher", seed=0).eval()
    network.load_state_dict(teacher.state_dict())
    assert confidence_in_noise(network) == pytest.approx(CALM, abs=0.02)
    assert hardness(network, calm) == []


def test_teacher_is_not_sure_because_noise_is_louder_than_its_images_were(teacher):
    for _, layer in layers_with_statistics(teacher):
        layer.running_var.fill_(1e-6)
    noise = torch.randn(NOISE_IMAGES, *SPACE.shape, generator=rng_from(0))
    assert teacher(noise).softmax(1).amax(1).median() > TOO_SURE
    assert temperature_for(teacher, SPEC) == 1
    assert hardness(teacher, SPEC) == []


def test_check_tells_it(tmp_path, monkeypatch):
    recipe = toy_recipe(tmp_path)
    monkeypatch.setattr(hardness_module, "TOO_SURE", 0.0)
    expected = hardness(open_teacher(recipe).module, recipe.teacher)
    assert expected
    assert check(recipe).notes == tuple(expected)
