"""Picture files in the channels and size of an image space."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raydfkd.config.schema import ImageSpace
from raydfkd.errors import RecipeError
from raydfkd.images.pictures import BrokenPictureError, pictures_in, read_picture


def space(channels: int, size: object) -> ImageSpace:
    return ImageSpace(channels=channels, size=size, mean=(0.5,) * channels, std=(0.25,) * channels)


def saved(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [8, (8, 20), (20, 8)])
def test_picture_gets_channels_and_size(tmp_path: Path, channels: int, size: object) -> None:
    path = saved(tmp_path / "a.png", np.full((30, 17, 3), (10, 10, 10), np.uint8))
    pixels = read_picture(path, space(channels, size))
    assert pixels.dtype == torch.uint8
    assert tuple(pixels.shape) == space(channels, size).shape
    assert (pixels[0] == 10).all()


def test_wide_picture_loses_its_sides_and_keeps_its_proportions(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    found = read_picture(saved(tmp_path / "a.png", pixels), space(3, 10))
    assert (found == 255).all()


def test_crop_keeps_the_middle(tmp_path: Path) -> None:
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[10:30, 10:30] = 255
    assert (read_picture(saved(tmp_path / "a.png", pixels), space(3, 20), crop=0.5) == 255).all()


def test_same_size_is_the_same_pixels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    found = read_picture(saved(tmp_path / "a.png", pixels), space(3, (12, 9)))
    assert (found.permute(1, 2, 0).numpy() == pixels).all()


def test_broken_picture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0 and no more")
    with pytest.raises(BrokenPictureError, match=r"broken\.jpg cannot be decoded"):
        read_picture(path, space(3, 8))


def test_channels_that_pictures_do_not_have(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(RecipeError, match="channels is 2, but picture files have 1, 3 or 4"):
        read_picture(path, space(2, 4))


def test_pictures_are_found_below_and_others_are_not(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("b/2.JPG", "1.png", ".hidden.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in pictures_in(tmp_path)] == ["1.png", "2.JPG"]
