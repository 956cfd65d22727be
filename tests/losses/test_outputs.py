from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from toy import batches_of, batchnorm_teacher, toy_images, toy_recipe, toy_view

from raydfkd.errors import RecipeError
from raydfkd.losses.objective import TERMS, View
from raydfkd.networks.observed import Observation

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0], [-2.0, 0.0, 0.3], [1.0, 1.5, -1.0]])


def value_of(name, logits, *, targets=None, features=None, **options):
    seen = Observation(logits=logits, features=features)
    view = View(images=torch.zeros(len(logits), 1, 2, 2), targets=targets, teacher=seen, observe=lambda _: seen)
    return TERMS.build(name, options, where="test")(view).item()


def softmax(logits):
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_cross_entropy_with_labels_is_the_mean_negative_log_probability_of_the_target(temperature):
    targets = torch.tensor([0, 1, 1, 2])
    probabilities = softmax(LOGITS.numpy() / temperature)
    expected = -np.log(probabilities[np.arange(4), targets.numpy()]).mean()
    assert value_of("cross_entropy", LOGITS, targets=targets, temperature=temperature) == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_cross_entropy_with_soft_targets_weighs_every_class(temperature):
    targets = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.0, 0.0, 1.0], [0.3, 0.3, 0.4]])
    log_probabilities = np.log(softmax(LOGITS.numpy() / temperature))
    expected = -(targets.numpy() * log_probabilities).sum(1).mean()
    assert value_of("cross_entropy", LOGITS, targets=targets, temperature=temperature) == pytest.approx(expected)


def test_cross_entropy_of_an_indifferent_teacher_is_the_logarithm_of_the_number_of_classes():
    assert value_of("cross_entropy", torch.zeros(4, 3), targets=torch.tensor([0, 1, 2, 0])) == pytest.approx(
        math.log(3)
    )


def test_one_hot_is_the_mean_negative_log_of_the_largest_probability():
    expected = -np.log(softmax(LOGITS.numpy()).max(1)).mean()
    assert value_of("one_hot", LOGITS) == pytest.approx(expected)


def test_one_hot_runs_from_nothing_for_a_sure_teacher_to_ln_k_for_an_indifferent_one():
    assert value_of("one_hot", 100 * torch.eye(3)) == pytest.approx(0, abs=1e-6)
    assert value_of("one_hot", torch.zeros(5, 3)) == pytest.approx(math.log(3))


def test_class_balance_is_the_negative_entropy_of_the_mean_answer():
    mean = softmax(LOGITS.numpy()).mean(0)
    assert value_of("class_balance", LOGITS) == pytest.approx((mean * np.log(mean)).sum())


@pytest.mark.parametrize("classes", [3, 10])
def test_class_balance_of_equally_frequent_sure_answers_is_minus_ln_k_in_nats(classes):
    """The released code takes logarithms to base 10 and would find -1 for ten classes."""
    assert value_of("class_balance", 100 * torch.eye(classes)) == pytest.approx(-math.log(classes), rel=1e-5)


def test_class_balance_of_one_class_alone_is_zero():
    one_class = torch.tensor([[100.0, 0.0, 0.0]]).repeat(5, 1)
    assert value_of("class_balance", one_class) == pytest.approx(0, abs=1e-6)


def test_class_balance_gives_a_finite_gradient_where_a_class_never_occurs():
    logits = torch.tensor([[300.0, 0.0, 0.0]]).repeat(4, 1).requires_grad_()
    seen = Observation(logits=logits)
    view = View(images=torch.zeros(4, 1, 2, 2), targets=None, teacher=seen, observe=lambda _: seen)
    TERMS.build("class_balance", {}, where="test")(view).backward()
    assert logits.grad.isfinite().all()


def test_activation_is_minus_the_mean_absolute_feature():
    features = torch.tensor([[1.0, -2.0], [0.0, 4.0], [-1.0, 0.0], [3.0, 1.0]])
    assert value_of("activation", LOGITS, features=features) == pytest.approx(-12 / 8)


def test_activation_of_a_layer_is_minus_the_mean_absolute_number_of_its_output():
    output = torch.tensor([[[[1.0, -2.0]], [[0.0, 3.0]]], [[[-1.0, -1.0]], [[4.0, 0.0]]]])
    seen = Observation(logits=LOGITS[:2], layers={"body.1": output})
    view = View(images=torch.zeros(2, 1, 2, 2), targets=None, teacher=seen, observe=lambda _: seen)
    assert TERMS.build("activation", {"layer": "body.1"}, where="test")(view).item() == pytest.approx(-12 / 8)


def test_activation_of_the_first_convolution_is_found_in_any_teacher():
    teacher, images = batchnorm_teacher(), toy_images(4)
    convolution = next(layer for layer in teacher.modules() if isinstance(layer, torch.nn.Conv2d))
    term = TERMS.build("activation", {"layer": "first_convolution"}, where="test")
    found = term(toy_view(images, teacher=teacher, taps=term.taps))
    torch.testing.assert_close(found, -convolution(images).abs().mean())


def test_layer_that_the_teacher_has_not_is_refused_with_the_recipe_s_term(tmp_path):
    with pytest.raises(RecipeError, match=r"synthesis.objective's activation names the layer 'body.9', which the teac"):
        batches_of(toy_recipe(tmp_path, ["synthesis.objective=[{term: activation, layer: body.9}]"]))
