from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from raydfkd.config.schema import ImageSpace
from raydfkd.images.pixels import (
    BLACK,
    WHITE,
    PixelRange,
    nominal_from_uint8,
    nominal_from_unit,
    nominal_to_uint8,
)

SPACES = {
    "identity": ImageSpace(channels=1, size=16, mean=(0.0,), std=(1.0,)),
    "digits": ImageSpace(channels=1, size=16, mean=(0.3056,), std=(0.3237,)),
    "imagenet": ImageSpace(channels=3, size=16, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "steep": ImageSpace(channels=1, size=16, mean=(0.9,), std=(1e-3,)),
}


def every_byte(channels):
    return torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, channels, 1, 1)


@pytest.fixture(params=SPACES, ids=str)
def space(request):
    return SPACES[request.param]


def test_every_stored_pixel_survives_nominal_units():
    stored = every_byte(3)
    assert torch.equal(nominal_to_uint8(nominal_from_uint8(stored)), stored)


def test_normalising_subtracts_the_mean_and_divides_by_the_deviation(space):
    stored = every_byte(space.channels)
    expected = torch.empty(stored.shape, dtype=torch.float64)
    for channel, (mean, std) in enumerate(zip(space.mean, space.std, strict=True)):
        expected[:, channel] = (stored[:, channel].double() / 255 - mean) / std
    found = PixelRange(space).from_uint8(stored)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6 / min(space.std))


def test_network_gets_the_same_from_stored_pixels_and_from_nominal_ones(space):
    pixels, stored = PixelRange(space), every_byte(space.channels)
    found = pixels.from_nominal(nominal_from_uint8(stored))
    torch.testing.assert_close(found, pixels.from_uint8(stored), rtol=1e-5, atol=1e-6 / min(space.std))


def test_black_and_white_are_equally_far_from_mid_grey_which_is_zero():
    found = nominal_from_uint8(torch.tensor([0, 255], dtype=torch.uint8))
    torch.testing.assert_close(found, torch.tensor([BLACK, WHITE]))
    assert nominal_from_unit(torch.tensor(0.5)) == 0
    assert (-BLACK, pytest.approx(1 / 0.225)) == (WHITE, WHITE - BLACK)


def test_images_beyond_black_and_white_are_stored_black_and_white():
    assert nominal_to_uint8(torch.tensor([5 * BLACK, 5 * WHITE])).tolist() == [0, 255]


def test_image_is_stored_as_the_nearest_pixels():
    between = nominal_from_unit(torch.tensor([10.4, 10.6, 254.4, 254.6]) / 255)
    assert nominal_to_uint8(between).tolist() == [10, 11, 254, 255]


@pytest.mark.parametrize(("made", "size"), [(16, 8), (12, 8), ((16, 4), (8, 8))])
def test_larger_images_are_scaled_down_as_averages(made, size):
    space = ImageSpace(channels=1, size=size, mean=(0.4,), std=(0.3,))
    larger = space.model_copy(update={"size": made})
    stored = torch.randint(0, 256, (3, *larger.shape), generator=torch.Generator().manual_seed(0)).byte()
    large = Image.fromarray(stored[0, 0].numpy()).convert("F")
    expected = np.asarray(large.resize((space.width, space.height), Image.Resampling.BILINEAR))
    found = PixelRange(space, made=larger).from_uint8(stored)[0, 0]
    torch.testing.assert_close(found, (torch.tensor(expected) / 255 - 0.4) / 0.3, rtol=1e-4, atol=1e-4)
