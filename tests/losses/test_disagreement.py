from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from toy import batchnorm_teacher, plain_teacher, toy_images

from raydfkd.config.schema import TermSpec
from raydfkd.errors import RecipeError
from raydfkd.losses.objective import TERMS, View, build_objective, terms_that_need
from raydfkd.networks.observed import Need, Observation, ObservedNetwork

TEACHER = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0], [-2.0, 0.0, 0.3], [1.0, 1.5, -1.0]])
STUDENT = torch.tensor([[1.0, 0.0, 0.5], [2.0, 0.5, 1.0], [-1.0, -1.5, 0.2], [2.0, 3.0, 0.0]])
SHIFT = torch.tensor([0.1, -0.2, 0.3])
"""Keeps a student's answer from being the teacher's but for scale."""
ALIKE = [0, 2, 3]
"""Rows that both decide alike."""
DISAGREEMENT = terms_that_need(Need.STUDENT)


def value(name, student, teacher, progress=1.0, **options):
    """Of answers [N, K], as a tensor."""
    seen = Observation(logits=teacher)
    view = View(
        images=torch.zeros(len(teacher), 1, 2, 2),
        targets=None,
        teacher=seen,
        observe=lambda _: seen,
        student=Observation(logits=student),
        progress=progress,
    )
    return TERMS.build(name, options, where="test")(view)


def softmax(logits):
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def divergence(answer, reference):
    """KL(answer || reference) of each row [N]."""
    return (answer * np.log(answer / reference)).sum(1)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_competition_is_one_minus_the_mean_jensen_shannon_divergence_of_the_softened_answers(temperature):
    student, teacher = (softmax(logits.numpy() / temperature) for logits in (STUDENT, TEACHER))
    mixture = (student + teacher) / 2
    expected = 1 - (divergence(student, mixture) / 2 + divergence(teacher, mixture) / 2).mean()
    assert value("competition", STUDENT, TEACHER, temperature=temperature).item() == pytest.approx(expected)


def test_competition_softens_by_three_unless_told_otherwise():
    torch.testing.assert_close(
        value("competition", STUDENT, TEACHER), value("competition", STUDENT, TEACHER, temperature=3.0)
    )


def test_competition_runs_from_one_minus_ln_2_for_opposite_answers_to_one_for_the_same():
    assert value("competition", 100 * torch.eye(3), 100 * torch.eye(3).roll(1, 1)).item() == pytest.approx(
        1 - math.log(2)
    )
    assert value("competition", TEACHER, TEACHER).item() == pytest.approx(1)
    assert value("competition", TEACHER + 7, TEACHER).item() == pytest.approx(1), "a shift changes no answer"


def test_competition_does_not_care_which_network_is_the_student():
    torch.testing.assert_close(value("competition", STUDENT, TEACHER), value("competition", TEACHER, STUDENT))


def test_competition_still_pulls_at_confident_answers_among_many_classes():
    """Nearly all softened probabilities are below 0.01 here, where the released code clamps them to a constant."""
    rng = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 1000, generator=rng).requires_grad_() for _ in range(2))
    assert (teacher / 3).softmax(1).max() < 0.01
    for gradient in torch.autograd.grad(value("competition", student, teacher), (student, teacher)):
        assert (gradient.norm(dim=1) > 1e-4).all()


def test_logit_gap_is_minus_the_mean_absolute_difference_over_images_and_classes():
    expected = -np.abs(STUDENT.numpy() - TEACHER.numpy()).mean()
    assert value("logit_gap", STUDENT, TEACHER).item() == pytest.approx(expected)


def test_decision_gap_is_minus_the_divergence_of_teacher_from_student_where_both_decide_alike():
    student, teacher = (softmax(logits.numpy()) for logits in (STUDENT, TEACHER))
    assert np.flatnonzero(student.argmax(1) == teacher.argmax(1)).tolist() == ALIKE
    expected = -divergence(teacher, student)[ALIKE].sum() / len(TEACHER)
    assert value("decision_gap", STUDENT, TEACHER).item() == pytest.approx(expected)


def test_decision_gap_leaves_an_image_alone_that_the_networks_already_decide_differently():
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    for gradient in torch.autograd.grad(value("decision_gap", student, teacher), (student, teacher)):
        assert gradient.abs().amax(1).nonzero().flatten().tolist() == ALIKE
    different = [row for row in range(len(TEACHER)) if row not in ALIKE]
    assert value("decision_gap", STUDENT[different], TEACHER[different]).item() == 0


@pytest.mark.parametrize("name", ["logit_gap", "decision_gap"])
def test_gap_of_a_perfect_student_is_zero_and_of_any_other_negative(name):
    assert value(name, TEACHER, TEACHER).item() == pytest.approx(0)
    assert value(name, STUDENT, TEACHER).item() < 0


@pytest.mark.parametrize("name", DISAGREEMENT)
def test_disagreement_lowers_every_term(name):
    apart = value(name, TEACHER + 0.3 * (STUDENT - TEACHER), TEACHER)
    assert value(name, TEACHER, TEACHER) > apart > value(name, TEACHER + 0.4 * (STUDENT - TEACHER), TEACHER)


@pytest.mark.parametrize("scale", [0.0, 1e2, 1e4, 1e8])
@pytest.mark.parametrize("name", DISAGREEMENT)
def test_value_and_gradient_are_finite_for_extreme_logits(name, scale):
    student, teacher = (scale * STUDENT).requires_grad_(), (scale * TEACHER).requires_grad_()
    found = value(name, student, teacher)
    assert found.isfinite()
    if name == "competition":
        assert 1 - math.log(2) - 1e-6 <= found.item() <= 1 + 1e-6
    for gradient in torch.autograd.grad(found, (student, teacher)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", DISAGREEMENT)
def test_gradient_agrees_with_finite_differences_in_both_answers(name):
    answers = (STUDENT.double().requires_grad_(), TEACHER.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda student, teacher: value(name, student, teacher), answers)


@pytest.mark.parametrize("name", DISAGREEMENT)
def test_images_are_moved_through_both_frozen_networks_and_no_weight_is(name):
    images = toy_images(8)
    teacher = ObservedNetwork(batchnorm_teacher(), frozen=True)
    student = ObservedNetwork(plain_teacher(seed=1), frozen=True)
    answers = student(images).logits, teacher(images).logits
    (whole,) = torch.autograd.grad(value(name, *answers), images, retain_graph=True)
    through_student, through_teacher = (
        torch.autograd.grad(value(name, *pair), images, retain_graph=True)[0]
        for pair in ((answers[0], answers[1].detach()), (answers[0].detach(), answers[1]))
    )
    assert through_student.norm() > 0
    assert through_teacher.norm() > 0
    torch.testing.assert_close(whole, through_student + through_teacher)


@pytest.mark.parametrize("name", DISAGREEMENT)
def test_term_is_refused_in_one_line_where_no_student_is_trained(name):
    specs = [TermSpec.model_validate(name)]
    assert build_objective(specs, has_targets=True, offers={Need.STUDENT}).needs == {Need.STUDENT}
    with pytest.raises(
        RecipeError, match=rf"synthesis.objective\[0\]: {name} needs the student, but .*; drop the term"
    ):
        build_objective(specs, has_targets=True, absent={Need.STUDENT: "but nobody trains one; drop the term"})


def test_logit_gap_by_logarithm_is_the_mean_over_images_of_the_log_of_one_plus_each_gap():
    gaps = np.abs(STUDENT.numpy() - TEACHER.numpy()).mean(1)
    assert value("logit_gap", STUDENT, TEACHER, log=True).item() == pytest.approx(-np.log(1 + gaps).mean())


def standardized(logits):
    return (logits - logits.mean(1, keepdims=True)) / logits.std(1, keepdims=True)


@pytest.mark.parametrize("log", [False, True])
def test_standardized_logit_gap_compares_logits_without_their_mean_and_spread(log):
    gaps = np.abs(standardized(STUDENT.numpy()) - standardized(TEACHER.numpy())).mean(1)
    expected = -(np.log(1 + gaps) if log else gaps).mean()
    assert value("logit_gap", STUDENT, TEACHER, standardize=True, log=log).item() == pytest.approx(expected)


def test_standardized_logit_gap_says_nothing_of_scale_and_is_at_most_two():
    found = value("logit_gap", STUDENT, TEACHER, standardize=True)
    scaled = value("logit_gap", 30 * STUDENT + 7, 0.1 * TEACHER - 2, standardize=True)
    torch.testing.assert_close(scaled, found, rtol=1e-5, atol=0)
    answers = torch.tensor([[50.0, -50.0], [-3.0, 3.0]])
    assert value("logit_gap", -answers, answers, standardize=True).item() == pytest.approx(-2)
    flat = torch.zeros(4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(value("logit_gap", flat, TEACHER, standardize=True), flat)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_decision_gap_everywhere_is_minus_the_mean_divergence_of_all_softened_answers(temperature):
    student, teacher = (softmax(logits.numpy() / temperature) for logits in (STUDENT, TEACHER))
    found = value("decision_gap", STUDENT, TEACHER, where="everywhere", temperature=temperature)
    assert found.item() == pytest.approx(-divergence(teacher, student).mean(), rel=1e-5)


def test_decision_gap_softens_where_both_decide_alike_too():
    student, teacher = (softmax(logits.numpy() / 5) for logits in (STUDENT, TEACHER))
    found = value("decision_gap", STUDENT, TEACHER, temperature=5.0)
    assert found.item() == pytest.approx(-divergence(teacher, student)[ALIKE].sum() / len(TEACHER), rel=1e-5)


GAPS = {
    "logit_gap": lambda: np.abs(STUDENT.numpy() - TEACHER.numpy()).mean(1),
    "decision_gap": lambda: divergence(softmax(TEACHER.numpy()), softmax(STUDENT.numpy())),
}


@pytest.mark.parametrize("name", GAPS)
def test_easy_first_leaves_images_out_whose_gap_is_beyond_the_threshold_of_this_progress(name):
    gaps = np.sort(GAPS[name]())
    assert len(np.unique(gaps.round(3))) > 2
    low, high = float(gaps[0] + gaps[1]) / 2, float(gaps[-1]) * 1.01
    options = {"easy_first": {"from": low, "to": high, "until": 0.5}} | (
        {"where": "everywhere"} if name == "decision_gap" else {}
    )
    for progress in (0.0, 0.25, 0.5, 1.0):
        threshold = low + (high - low) * min(1.0, progress / 0.5)
        expected = -gaps[gaps <= threshold].sum() / len(gaps)
        found = value(name, STUDENT, TEACHER, progress=progress, **options)
        assert found.item() == pytest.approx(expected, rel=1e-5), progress
    student = STUDENT.clone().requires_grad_()
    value(name, student, TEACHER, progress=0.0, **options).backward()
    moved = student.grad.abs().amax(1).nonzero().flatten().tolist()
    assert moved == np.flatnonzero(GAPS[name]() <= low).tolist()


def test_threshold_of_easy_images_is_in_logarithms_where_the_gap_is():
    gaps = np.sort(np.log(1 + GAPS["logit_gap"]()))
    threshold = float(gaps[1] + gaps[2]) / 2
    found = value("logit_gap", STUDENT, TEACHER, log=True, easy_first={"from": threshold, "to": threshold})
    assert found.item() == pytest.approx(-gaps[:2].sum() / len(gaps))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("logit_gap", {"log": True, "standardize": True}),
        ("logit_gap", {"easy_first": {"from": 1, "to": 2}}),
        ("decision_gap", {"where": "everywhere", "temperature": 4.0}),
    ],
)
def test_gradient_of_each_form_agrees_with_finite_differences(name, options):
    answers = ((STUDENT + SHIFT).double().requires_grad_(), TEACHER.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda student, teacher: value(name, student, teacher, **options), answers)
