from __future__ import annotations

import pytest
import torch

from raydfkd.config.schema import ImageSpace
from raydfkd.images.pixels import PixelRange

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


def test_every_stored_pixel_survives_normalising_and_storing_again(space):
    pixels, stored = PixelRange(space), every_byte(space.channels)
    assert torch.equal(pixels.to_uint8(pixels.from_uint8(stored)), stored)


def test_normalising_subtracts_the_mean_and_divides_by_the_deviation(space):
    stored = every_byte(space.channels)
    expected = torch.empty(stored.shape, dtype=torch.float64)
    for channel, (mean, std) in enumerate(zip(space.mean, space.std, strict=True)):
        expected[:, channel] = (stored[:, channel].double() / 255 - mean) / std
    found = PixelRange(space).from_uint8(stored)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6 / min(space.std))


def test_bounds_are_normalised_black_and_white(space):
    pixels = PixelRange(space)
    black, white = pixels.bounds
    assert black.shape == white.shape == (1, space.channels, 1, 1)
    seen = pixels.from_uint8(every_byte(space.channels))
    torch.testing.assert_close(seen.amin((0, 2, 3)), black.flatten())
    torch.testing.assert_close(seen.amax((0, 2, 3)), white.flatten())


def test_images_beyond_the_bounds_are_stored_black_and_white(space):
    black, white = PixelRange(space).bounds
    outside = torch.cat([black - 5 * (white - black), white + 5 * (white - black)])
    assert PixelRange(space).to_uint8(outside)[:, 0].flatten().tolist() == [0, 255]


def test_image_is_stored_as_the_nearest_pixels():
    pixels = PixelRange(SPACES["identity"])
    between = torch.tensor([10.4, 10.6, 254.4, 254.6]).view(4, 1, 1, 1) / 255
    assert pixels.to_uint8(between).flatten().tolist() == [10, 11, 254, 255]
