"""Criteria that compare layers: against direct computations, and with connectors in between."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from raydfkd.distillation.criteria import CRITERIA
from raydfkd.networks.observed import Layer, Need, Observation
from raydfkd.seeds import rng_from, seeded

LABELS = torch.tensor([0, 1, 2, 0])


def maps(channels, size=4, seed=0, count=4):
    return torch.randn(count, channels, size, size, generator=rng_from(seed), dtype=torch.float64)


def drawn(*shape, seed=0, **options):
    return torch.randn(*shape, generator=rng_from(seed), **options)


def seen(output):
    return Observation(logits=torch.zeros(len(output), 3), features=output.flatten(1), layers={"layer": output})


def criterion_of(name, **options):
    return CRITERIA.build(name, {"student": "layer", "teacher": "layer", **options}, where="test")


def value_of(name, student, teacher, **options):
    return criterion_of(name, **options)(seen(student), seen(teacher), LABELS)


def test_hint_is_the_mean_squared_difference():
    student, teacher = maps(3), maps(3, seed=1)
    torch.testing.assert_close(value_of("hint", student, teacher), ((student - teacher) ** 2).mean())


def test_activation_boundary_is_the_hinge_of_the_paper_divided_by_the_units():
    student, teacher = maps(3), maps(3, seed=1)
    paper = sum(
        max(0.0, 1 - s) ** 2 if t > 0 else max(0.0, 1 + s) ** 2
        for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    )
    assert value_of("activation_boundary", student, teacher).item() == pytest.approx(paper / student.numel())


def test_activation_boundary_costs_nothing_beyond_the_margin_on_the_teacher_s_side():
    teacher = maps(3)
    side = torch.where(teacher > 0, 1.0, -1.0)
    assert value_of("activation_boundary", 2.0 * side, teacher, margin=2.0) == 0
    assert value_of("activation_boundary", -2.0 * side, teacher, margin=2.0) == 16


def test_attention_transfer_compares_normalised_sums_of_squares_over_channels():
    student, teacher = maps(2), maps(5, seed=1)
    difference = torch.zeros(4, 16, dtype=torch.float64)
    for image in range(4):
        for sign, output in ((1, student), (-1, teacher)):
            attention = sum(channel.flatten() ** 2 for channel in output[image])
            difference[image] += sign * attention / attention.norm()
    torch.testing.assert_close(value_of("attention_transfer", student, teacher), (difference**2).mean())


def test_attention_of_a_larger_map_is_averaged_down_to_that_of_the_smaller_one():
    student, teacher = maps(2, size=8), maps(5, size=4, seed=1)
    small = F.avg_pool2d((student**2).sum(1, keepdim=True), 2).sqrt()
    torch.testing.assert_close(
        value_of("attention_transfer", student, teacher), value_of("attention_transfer", small, teacher)
    )


def relations(points):
    """Normalised distances of all pairs, and cosines at every image between any two others, one by one."""
    pairs = [(points[i] - points[j]).norm() for i, j in itertools.combinations(range(len(points)), 2)]
    distances = torch.stack(pairs) / (sum(pairs) / len(pairs))
    angles = [
        F.cosine_similarity(points[i] - points[at], points[j] - points[at], dim=0)
        for at, i, j in itertools.permutations(range(len(points)), 3)
    ]
    return distances, torch.stack(angles)


@pytest.mark.parametrize(("distance", "angle"), [(1.0, 2.0), (25.0, 0.0), (0.0, 50.0)])
def test_relational_compares_distances_and_angles_of_all_images(distance, angle):
    student, teacher = maps(2, count=5), maps(3, seed=1, count=5)
    ours, theirs = relations(student.flatten(1)), relations(teacher.flatten(1))
    expected = distance * F.smooth_l1_loss(ours[0], theirs[0]) + angle * F.smooth_l1_loss(ours[1], theirs[1])
    torch.testing.assert_close(value_of("relational", student, teacher, distance=distance, angle=angle), expected)


def test_relational_does_not_change_when_the_student_s_features_are_turned_scaled_and_shifted():
    student, teacher = drawn(6, 5, dtype=torch.float64), drawn(6, 3, seed=1, dtype=torch.float64)
    turn, _ = torch.linalg.qr(drawn(5, 5, dtype=torch.float64))
    torch.testing.assert_close(
        value_of("relational", 3 * student @ turn + 7, teacher), value_of("relational", student, teacher)
    )


@pytest.mark.parametrize("count", [1, 2])
def test_relational_of_too_few_images_is_finite_with_a_gradient(count):
    student = drawn(count, 5, requires_grad=True)
    value = value_of("relational", student, drawn(count, 3))
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_relational_of_an_image_that_is_there_twice_has_a_finite_gradient():
    student = drawn(4, 5).repeat(2, 1).requires_grad_()
    value_of("relational", student, drawn(4, 3).repeat(2, 1)).backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "student", "teacher"),
    [
        ("hint", maps(2), maps(2, seed=1)),
        ("activation_boundary", maps(2), maps(2, seed=1)),
        ("attention_transfer", maps(2), maps(3, size=2, seed=1)),
        ("relational", maps(2, size=2), maps(3, size=2, seed=1)),
    ],
)
def test_gradient_for_the_student_is_that_of_the_value(name, student, teacher):
    criterion = criterion_of(name)
    assert torch.autograd.gradcheck(
        lambda output: criterion(seen(output), seen(teacher), LABELS), student.clone().requires_grad_()
    )


def connected(name, student, teacher, seed=0):
    criterion = criterion_of(name)
    with seeded(seed):
        connector = criterion.connector(seen(student), seen(teacher))
    if connector is not None:
        criterion.attach(connector)
    return criterion, connector


@pytest.mark.parametrize("name", ["hint", "activation_boundary"])
def test_layers_of_one_width_are_compared_without_anything_between(name):
    assert connected(name, maps(3), maps(3))[1] is None
    assert connected(name, maps(3, size=8), maps(3))[1] is None


@pytest.mark.parametrize(
    ("student", "teacher", "layers"),
    [
        (drawn(4, 3, 4, 4), drawn(4, 5, 4, 4), [nn.Conv2d, nn.BatchNorm2d]),
        (drawn(4, 3, 4, 4), drawn(4, 5, 8, 8), [nn.Conv2d, nn.BatchNorm2d]),
        (drawn(4, 3, 9, 4), drawn(4, 5, 4, 8), [nn.Conv2d, nn.BatchNorm2d]),
        (drawn(4, 3), drawn(4, 5), [nn.Linear]),
        (drawn(4, 7, 3), drawn(4, 7, 5), [nn.Linear]),
    ],
)
def test_connector_brings_the_student_s_width_to_the_teacher_s_and_learns(student, teacher, layers):
    criterion, connector = connected("hint", student, teacher)
    assert [type(layer) for layer in connector.modules() if not list(layer.children())] == layers
    value = criterion(seen(student), seen(teacher), LABELS)
    value.backward()
    assert value.shape == ()
    assert all(weight.grad.isfinite().all() and weight.grad.any() for weight in connector.parameters())


def test_hint_through_a_connector_is_that_of_what_it_makes_of_the_layer():
    student, teacher = drawn(4, 3), drawn(4, 5)
    criterion, connector = connected("hint", student, teacher)
    expected = F.mse_loss(student @ connector.weight.T + connector.bias, teacher)
    torch.testing.assert_close(criterion(seen(student), seen(teacher), LABELS), expected)


@pytest.mark.parametrize(
    ("name", "student", "teacher", "reason"),
    [
        (
            "hint",
            torch.zeros(4, 3),
            torch.zeros(4, 3, 4, 4),
            "layer answers 3 .* layer 3x4x4, which cannot be connected",
        ),
        ("hint", torch.zeros(4, 3, 2), torch.zeros(4, 4, 2), "3x2 .* 4x2, which cannot be connected"),
        (
            "attention_transfer",
            torch.zeros(4, 3),
            torch.zeros(4, 3, 4, 4),
            "the student's layer answers 3 for each image",
        ),
    ],
)
def test_layers_that_cannot_be_compared_are_refused_with_their_shapes(name, student, teacher, reason):
    with pytest.raises(ValueError, match=reason):
        connected(name, student, teacher)


def test_penultimate_is_the_input_of_the_layer_that_makes_the_logits():
    criterion = CRITERIA.build("hint", {"student": "body.1"}, where="test")
    assert criterion.student_taps == {Layer("body.1")}
    assert criterion.teacher_taps == {Need.FEATURES}
    student, teacher = drawn(4, 3), drawn(4, 3, seed=1)
    value = criterion(Observation(logits=student, layers={"body.1": student}), seen(teacher), LABELS)
    torch.testing.assert_close(value, F.mse_loss(student, teacher))
