from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch

from raydfkd.config.schema import ImageSpace
from raydfkd.images.pixels import PixelRange
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


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.414])
def test_smoothness_is_the_mean_squared_difference_from_a_gaussian_blur_over_five_pixels(sigma):
    blurred = scipy.ndimage.gaussian_filter(IMAGES.double().numpy(), (0, 0, sigma, sigma), mode="nearest", radius=2)
    expected = np.square(IMAGES.double().numpy() - blurred).mean()
    assert value_of("smoothness", IMAGES, sigma=sigma) == pytest.approx(expected, rel=1e-5)


def test_smoothness_of_a_flat_image_is_zero_and_of_stripes_more_than_of_a_slope():
    assert value_of("smoothness", torch.full((2, 3, 5, 6), 0.7)) == pytest.approx(0, abs=1e-12)
    slope = torch.linspace(-1, 1, 8).expand(1, 1, 8, 8)
    stripes = torch.tensor([-1.0, 1.0] * 4).expand(1, 1, 8, 8)
    assert value_of("smoothness", stripes) > 20 * value_of("smoothness", slope) > 0


@pytest.mark.parametrize("size", [(1, 1), (2, 3)])
def test_smoothness_takes_images_smaller_than_its_blur(size):
    assert np.isfinite(value_of("smoothness", torch.randn(2, 1, *size)))


@pytest.mark.parametrize("scope", ["image", "batch"])
def test_pixel_moments_are_compared_in_the_teacher_s_units_with_mean_0_and_deviation_1(scope):
    space = ImageSpace(channels=3, size=(5, 6), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    mean, std = (np.reshape(constants, (1, 3, 1, 1)) for constants in (space.mean, space.std))
    seen = (IMAGES.numpy() * 0.225 + 0.5 - mean) / std
    axes = (2, 3) if scope == "image" else (0, 2, 3)
    expected = (np.square(seen.mean(axes)) + np.square(seen.std(axes) - 1)).mean()
    teacher = Observation(logits=torch.zeros(4, 3))
    view = View(
        images=IMAGES,
        targets=None,
        teacher=teacher,
        observe=lambda _: teacher,
        seen=PixelRange(space).from_nominal(IMAGES),
    )
    found = TERMS.build("pixel_moments", {"scope": scope}, where="test")(view)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_pixel_moments_of_images_like_the_normalised_training_data_are_zero():
    pixels = torch.tensor([-1.0, 1.0] * 8).view(1, 1, 4, 4)
    seen = Observation(logits=torch.zeros(1, 3))
    view = View(images=pixels, targets=None, teacher=seen, observe=lambda _: seen, seen=pixels)
    assert TERMS.build("pixel_moments", {}, where="test")(view).item() == pytest.approx(0, abs=1e-12)
