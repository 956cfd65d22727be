from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from raydfkd.losses.objective import TERMS, View
from raydfkd.networks.observed import Observation

RNG = torch.Generator().manual_seed(0)
IMAGES = torch.randn(6, 2, 4, 4, generator=RNG)
LOGITS = torch.randn(6, 3, generator=RNG)
FEATURES = torch.randn(6, 5, generator=RNG)


def value_of(name, *, images=IMAGES, logits=LOGITS, features=FEATURES, targets=None, groups=1, **options):
    seen = Observation(logits=logits, features=features)
    view = View(images=images, targets=targets, teacher=seen, observe=lambda _: seen, groups=groups)
    return TERMS.build(name, options, where="test")(view).item()


def ratio(first, second, epsilon=0.1):
    """Distance of two answers over that of their images, by their numbers."""
    answers = LOGITS.softmax(1).numpy()
    pixels = np.sqrt(np.square(IMAGES[first].numpy() - IMAGES[second].numpy()).mean())
    return np.linalg.norm(answers[first] - answers[second]) / (pixels + epsilon)


@pytest.mark.parametrize("epsilon", [0.1, 0.5])
def test_mode_seeking_is_the_mean_over_pairs_of_the_two_halves_of_output_over_image_distance(epsilon):
    expected = np.mean([ratio(row, row + 3, epsilon) for row in range(3)])
    assert value_of("mode_seeking", epsilon=epsilon) == pytest.approx(expected, rel=1e-5)


def test_mode_seeking_pairs_images_of_one_class_where_images_have_one():
    three = np.mean([ratio(0, 1), ratio(2, 3), ratio(4, 5)])
    assert value_of("mode_seeking", groups=3) == pytest.approx(three, rel=1e-5)
    odd = np.mean([ratio(*pair) for pair in [(0, 1), (1, 2), (2, 0), (3, 4), (4, 5), (5, 3)]])
    assert value_of("mode_seeking", groups=2) == pytest.approx(odd, rel=1e-5)


def test_mode_seeking_does_not_grow_with_the_batch_or_the_size_of_the_images():
    once = value_of("mode_seeking")
    pairs = torch.arange(6).unflatten(0, (2, 3)).repeat(1, 2).flatten()
    assert value_of("mode_seeking", images=IMAGES[pairs], logits=LOGITS[pairs]) == pytest.approx(once, rel=1e-5)
    larger = IMAGES.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert value_of("mode_seeking", images=larger) == pytest.approx(once, rel=1e-5)


def test_mode_seeking_is_bounded_where_equal_images_have_opposite_answers():
    answers = 100 * torch.eye(2).repeat_interleave(3, 0)
    value = value_of("mode_seeking", images=torch.zeros(6, 2, 4, 4), logits=answers, epsilon=0.1)
    assert value == pytest.approx(math.sqrt(2) / 0.1, rel=1e-5)


def test_mode_seeking_of_a_single_image_is_zero():
    assert value_of("mode_seeking", images=IMAGES[:1], logits=LOGITS[:1]) == 0


def closeness(rows, epsilon=0.01):
    """Minus the mean log of the distances between the features of these pairs of rows."""
    units = FEATURES.double().numpy() / np.linalg.norm(FEATURES.double().numpy(), axis=1, keepdims=True)
    squares = [np.square(units[one] - units[other]).sum() for one, other in rows]
    return -np.mean([0.5 * np.log(square + epsilon**2) for square in squares])


@pytest.mark.parametrize("epsilon", [0.01, 0.3])
def test_feature_diversity_is_minus_the_mean_log_distance_of_normalised_features_over_all_pairs(epsilon):
    expected = closeness(itertools.combinations(range(6), 2), epsilon)
    assert value_of("feature_diversity", epsilon=epsilon) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("form", ["labels", "soft targets"])
def test_feature_diversity_within_classes_leaves_pairs_of_two_classes_out(form):
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    targets = labels if form == "labels" else torch.eye(3)[labels] * 0.8 + 0.1
    expected = closeness([(0, 2), (0, 5), (2, 5), (1, 4)])
    assert value_of("feature_diversity", targets=targets, within_class=True) == pytest.approx(expected, rel=1e-4)


def test_feature_diversity_does_not_depend_on_the_size_of_the_features():
    scales = torch.tensor([0.1, 1.0, 10.0, 3.0, 0.5, 7.0])[:, None]
    assert value_of("feature_diversity", features=scales * FEATURES) == pytest.approx(
        value_of("feature_diversity"), rel=1e-5
    )


def test_feature_diversity_runs_from_minus_ln_2_for_opposite_features_to_minus_ln_epsilon_for_equal_ones():
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert value_of("feature_diversity", features=opposite) == pytest.approx(-math.log(2), rel=1e-4)
    assert value_of("feature_diversity", features=opposite[[0, 0]]) == pytest.approx(-math.log(0.01), rel=1e-4)


@pytest.mark.parametrize("options", [{"features": FEATURES[:1]}, {"targets": torch.arange(6), "within_class": True}])
def test_feature_diversity_is_zero_where_there_is_no_pair(options):
    assert value_of("feature_diversity", **options) == 0
