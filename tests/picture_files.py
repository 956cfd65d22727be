"""Picture files for tests: each of one colour, so that it is known again whatever its size."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raydfkd.config.schema import ImageSpace, PluginSpec
from raydfkd.errors import RecipeError
from raydfkd.images.real_data import open_real_data

BROKEN = b"\xff\xd8\xff\xe0 and no more"


def space(size=8, channels=3):
    return ImageSpace(channels=channels, size=size, mean=(0.5,) * channels, std=(0.5,) * channels)


def png(colour: int, *, side: int = 12) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), colour, np.uint8)).save(file, "png")
    return file.getvalue()


def write_pictures(root: Path, files: dict[str, int | bytes]) -> Path:
    """Pictures of one colour, or other bytes, by their paths within ``root``."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(content) if isinstance(content, int) else content)
    return root


def opened(kind, count, names=None, /, *, image_space=None, **options):
    """A data set as a recipe with these options has it; paths are given as text."""
    options = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    return open_real_data(PluginSpec(kind=kind, **options), image_space or space(), count, names)


def colours(data, split="test", *, size=3):
    """Colour and label of each picture of a split, in its order, and the names of those left out."""
    found, broken = [], []
    for images, labels in data.load(split).batches(size, broken.append):
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        found += zip(images[:, 0, 0, 0].tolist(), labels.tolist(), strict=True)
    return found, broken


def refusal(kind, count, names=None, /, **options) -> str:
    """The one line with which a data set is refused."""
    with pytest.raises(RecipeError) as error:
        opened(kind, count, names, **options)
    assert "\n" not in str(error.value)
    return str(error.value)
