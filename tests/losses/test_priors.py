from __future__ import annotations

import numpy as np
import pytest
import torch

from raydfkd.losses.objective import TERMS, View
from raydfkd.networks.observed import Observation

IMAGES = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(0))


def value_of(name, images, **options):
    seen = Observation(logits=torch.zeros(len(images), 3))
    view = View(images=images, targets=None, teacher=seen, observe=lambda _: seen)
    return TERMS.build(name, options, where="test")(view).item()


def differences(x):
    """To the right, lower, lower left and lower right neighbour; [N, C, H, W] as NumPy."""
    return (
        x[:, :, :, 1:] - x[:, :, :, :-1],
        x[:, :, 1:, :] - x[:, :, :-1, :],
        x[:, :, 1:, :-1] - x[:, :, :-1, 1:],
        x[:, :, 1:, 1:] - x[:, :, :-1, :-1],
    )


def norm_over_the_whole_batch(x):
    """What the released code of Yin et al. computes."""
    return sum(np.sqrt(np.square(one).sum()) for one in differences(x))


def test_l2_variation_is_the_mean_over_images_of_a_norm_per_direction():
    expected = sum(np.sqrt(np.square(one).sum((1, 2, 3))).mean() for one in differences(IMAGES.numpy()))
    assert value_of("total_variation", IMAGES, norm="l2") == pytest.approx(expected, rel=1e-6)


def test_l1_variation_is_a_mean_absolute_difference_per_direction():
    expected = sum(np.abs(one).mean() for one in differences(IMAGES.numpy()))
    assert value_of("total_variation", IMAGES, norm="l1") == pytest.approx(expected, rel=1e-6)


def test_squared_variation_is_a_mean_squared_difference_per_direction():
    expected = sum(np.square(one).mean() for one in differences(IMAGES.numpy()))
    assert value_of("total_variation", IMAGES, norm="squared") == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("norm", ["l2", "l1", "squared"])
def test_flat_image_has_no_variation(norm):
    assert value_of("total_variation", torch.full((2, 3, 5, 6), 0.7), norm=norm) == 0


def test_l2_variation_does_not_grow_with_the_batch_as_that_of_the_released_code_does():
    one, four = IMAGES[:1], IMAGES[:1].repeat(4, 1, 1, 1)
    assert value_of("total_variation", one) == pytest.approx(norm_over_the_whole_batch(one.numpy()), rel=1e-6)
    assert value_of("total_variation", four) == pytest.approx(value_of("total_variation", one), rel=1e-6)
    assert norm_over_the_whole_batch(four.numpy()) == pytest.approx(2 * norm_over_the_whole_batch(one.numpy()))


def test_image_l2_is_the_mean_over_images_of_each_image_s_norm():
    expected = np.sqrt(np.square(IMAGES.numpy()).sum((1, 2, 3))).mean()
    assert value_of("image_l2", IMAGES) == pytest.approx(expected, rel=1e-6)


def test_image_l2_does_not_grow_with_the_batch_as_a_norm_over_all_of_it_would():
    four = IMAGES[:1].repeat(4, 1, 1, 1)
    assert value_of("image_l2", four) == pytest.approx(value_of("image_l2", IMAGES[:1]), rel=1e-6)
