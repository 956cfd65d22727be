from __future__ import annotations

import numpy as np
import pytest
import torch

from raydfkd.distillation.criteria import CRITERIA
from raydfkd.errors import RecipeError
from raydfkd.networks.observed import Observation

STUDENT = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0], [-2.0, 0.0, 0.3], [1.0, 1.5, -1.0]])
TEACHER = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 4.0, 2.0], [0.5, 0.5, 0.5], [3.0, -1.0, 2.0]])
LABELS = torch.tensor([0, 1, 2, 0])


def value_of(name, student=STUDENT, teacher=TEACHER, **options):
    criterion = CRITERIA.build(name, options, where="test")
    return criterion(Observation(logits=student), Observation(logits=teacher), LABELS)


def softmax(logits, temperature=1.0):
    exponentials = np.exp(logits.numpy() / temperature)
    return exponentials / exponentials.sum(1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_forward_kl_is_that_of_the_student_from_the_teacher_times_the_squared_temperature(temperature):
    p, q = softmax(TEACHER, temperature), softmax(STUDENT, temperature)
    expected = temperature**2 * (p * np.log(p / q)).sum(1).mean()
    assert value_of("soft_kl", temperature=temperature).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_backward_kl_is_that_of_the_teacher_from_the_student_times_the_squared_temperature(temperature):
    p, q = softmax(TEACHER, temperature), softmax(STUDENT, temperature)
    expected = temperature**2 * (q * np.log(q / p)).sum(1).mean()
    assert value_of("soft_kl", temperature=temperature, direction="backward").item() == pytest.approx(
        expected, rel=1e-4
    )


def test_gradient_of_forward_kl_is_the_softened_difference_times_the_temperature():
    student = STUDENT.clone().requires_grad_()
    value_of("soft_kl", student, temperature=4.0).backward()
    expected = 4 * (softmax(STUDENT, 4.0) - softmax(TEACHER, 4.0)) / len(STUDENT)
    torch.testing.assert_close(student.grad, torch.from_numpy(expected), rtol=1e-4, atol=1e-6)


def test_soft_kl_does_not_change_when_all_logits_of_an_image_are_shifted():
    shift = torch.tensor([[5.0], [-3.0], [0.0], [10.0]])
    torch.testing.assert_close(value_of("soft_kl", STUDENT + shift), value_of("soft_kl"))


@pytest.mark.parametrize("whose", ["teacher", "each"])
def test_standardised_kl_compares_logits_in_units_of_their_deviation(whose):
    student, teacher = 40 * STUDENT[[0, 1, 3]], 40 * TEACHER[[0, 1, 3]]
    scale = {"teacher": teacher, "each": student}[whose].std(1, keepdim=True, correction=0)
    expected = value_of(
        "soft_kl", student / scale, teacher / teacher.std(1, keepdim=True, correction=0), temperature=2.0
    )
    standardised = value_of("soft_kl", student, teacher, temperature=2.0, standardised=whose)
    torch.testing.assert_close(standardised, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("whose", ["teacher", "each"])
def test_image_with_large_logits_counts_no_more_than_others(whose):
    shift = torch.tensor([[5.0], [-3.0], [0.0]])
    student, teacher = 40 * STUDENT[[0, 1, 3]], 40 * TEACHER[[0, 1, 3]]
    plain = value_of("soft_kl", student, teacher, temperature=2.0, standardised=whose)
    larger = value_of("soft_kl", 60 * student, 60 * teacher + shift, temperature=2.0, standardised=whose)
    torch.testing.assert_close(larger, plain, rtol=1e-3, atol=1e-5)


def test_student_keeps_the_teachers_scale_unless_each_has_its_own():
    teacher = 40 * TEACHER[[0, 1, 3]]
    assert value_of("soft_kl", 3 * teacher, teacher, standardised="each").item() == pytest.approx(0, abs=1e-5)
    assert value_of("soft_kl", 3 * teacher, teacher, standardised="teacher").item() > 0.01
    assert value_of("soft_kl", teacher, teacher, standardised="teacher").item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("whose", ["teacher", "each"])
def test_standardised_kl_has_a_gradient_where_all_classes_are_alike(whose):
    student = torch.zeros(1, 3).requires_grad_()
    value_of("soft_kl", student, torch.zeros(1, 3), standardised=whose).backward()
    value_of("soft_kl", student, TEACHER[:1], standardised=whose).backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_mixed_kl_is_a_share_of_forward_and_the_rest_of_backward(alpha):
    parts = [value_of("soft_kl", direction=direction) for direction in ("forward", "backward")]
    mixed = value_of("soft_kl", direction="mixed", alpha=alpha)
    torch.testing.assert_close(mixed, alpha * parts[0] + (1 - alpha) * parts[1])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_js_is_half_the_divergences_of_both_answers_from_their_mean(temperature):
    p, q = softmax(TEACHER, temperature), softmax(STUDENT, temperature)
    mean = (p + q) / 2
    expected = ((p * np.log(p / mean)).sum(1) + (q * np.log(q / mean)).sum(1)).mean() / 2
    assert value_of("js", temperature=temperature).item() == pytest.approx(expected, rel=1e-5)


def test_js_is_at_most_ln_2_however_sure_and_wrong_the_student_is_and_has_a_gradient_there():
    student = torch.tensor([[100.0, 0.0, 0.0]]).requires_grad_()
    value = value_of("js", student, torch.tensor([[0.0, 100.0, 0.0]]))
    value.backward()
    assert value.item() == pytest.approx(np.log(2))
    assert student.grad.isfinite().all()


def test_logit_mse_is_the_mean_squared_difference_over_images_and_classes():
    expected = ((STUDENT.numpy() - TEACHER.numpy()) ** 2).mean()
    assert value_of("logit_mse").item() == pytest.approx(expected)


def test_smoothed_hard_labels_is_the_cross_entropy_with_labels_of_which_a_share_is_spread_over_all_classes():
    labels = 0.7 * np.eye(3)[LABELS.numpy()] + 0.1
    expected = -(labels * np.log(softmax(STUDENT))).sum(1).mean()
    assert value_of("hard_labels", smoothing=0.3).item() == pytest.approx(expected)


def test_hard_labels_of_mixed_images_is_the_cross_entropy_with_the_shares_of_their_classes():
    shares = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.2, 0.2, 0.6], [0.1, 0.0, 0.9]])
    criterion = CRITERIA.build("hard_labels", {}, where="test")
    value = criterion(Observation(logits=STUDENT), Observation(logits=TEACHER), shares)
    assert value.item() == pytest.approx(-(shares.numpy() * np.log(softmax(STUDENT))).sum(1).mean())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("soft_kl", {}),
        ("soft_kl", {"direction": "backward"}),
        ("soft_kl", {"direction": "mixed", "alpha": 0.3}),
        ("soft_kl", {"standardised": "teacher"}),
        ("soft_kl", {"standardised": "each"}),
        ("js", {"temperature": 2.0}),
        ("logit_l1", {}),
        ("logit_mse", {}),
        ("hard_labels", {"smoothing": 0.1}),
    ],
)
def test_gradient_for_the_student_is_that_of_the_value(name, options):
    student = STUDENT.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: value_of(name, logits, TEACHER.double(), **options), student)


def test_logit_l1_is_the_mean_absolute_difference_over_images_and_classes():
    expected = np.abs(STUDENT.numpy() - TEACHER.numpy()).mean()
    assert value_of("logit_l1").item() == pytest.approx(expected)


def test_hard_labels_is_the_cross_entropy_with_the_labels_whatever_the_teacher_says():
    expected = -np.log(softmax(STUDENT)[np.arange(4), LABELS.numpy()]).mean()
    assert value_of("hard_labels").item() == pytest.approx(expected)
    assert value_of("hard_labels", teacher=-TEACHER).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "reason"), [({"temperature": 0.0}, "positive"), ({"direction": "up"}, "direction")]
)
def test_option_that_makes_no_sense_is_refused(options, reason):
    with pytest.raises(RecipeError, match=reason):
        CRITERIA.build("soft_kl", options, where="test")
