"""Picture files: found in a folder, decoded, and brought to the channels and size of an image space."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from raydfkd.config.schema import ImageSpace
from raydfkd.errors import RecipeError, one_line

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
"""Endings of the files that are taken for pictures."""
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
CHANNELS = tuple(_MODES)
"""Numbers of channels that pictures have."""
# Of metadata, which mean nothing here. Once and for all: catch_warnings would not bear several threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BrokenPictureError(ValueError):
    """A file that should be a picture and cannot be decoded; the message names it."""


def is_picture(path: Path) -> bool:
    """Whether it is a file that is called like a picture; links to files count, hidden ones do not."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def pictures_in(folder: Path) -> list[Path]:
    """Every picture file in ``folder`` and below, sorted."""
    return sorted(filter(is_picture, folder.rglob("*")))


def check_channels(space: ImageSpace) -> None:
    """Find that pictures have no such number of channels.

    Raises:
        RecipeError: they have not.
    """
    if space.channels not in CHANNELS:
        raise RecipeError(
            f"teacher.image_space.channels is {space.channels}, but picture files have 1, 3 or 4; "
            "give real_data as a function of yours, module:callable"
        )


def read_picture(source: Path | bytes | Image.Image, space: ImageSpace, *, crop: float = 1.0) -> Tensor:
    """A picture as uint8 [C, H, W] of ``space``: scaled until it covers the size, then cut to its centre.

    Args:
        source: a file, its content, or a picture that was opened already.
        space: channels and size; its normalisation is not applied.
        crop: share of the scaled picture's edge that the cut keeps, such as 0.875 for 256 pixels cut to 224.

    Raises:
        BrokenPictureError: it cannot be decoded.
        RecipeError: pictures have no such number of channels.
    """
    from torchvision.transforms.v2 import functional as transforms  # a second, which other data sets are spared

    check_channels(space)
    try:
        picture = Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source
        picture = Image.open(picture) if isinstance(picture, Path) else picture
        picture = picture.convert(_MODES[space.channels])
    except Exception as error:  # a decoder's complaint about broken bytes may be anything
        name = source if isinstance(source, Path) else "a picture"
        raise BrokenPictureError(f"{name} cannot be decoded ({one_line(error)})") from error
    scale = max(space.height / crop / picture.height, space.width / crop / picture.width)
    size = [max(space.height, round(picture.height * scale)), max(space.width, round(picture.width * scale))]
    picture = transforms.resize(picture, size, antialias=True)
    picture = transforms.center_crop(picture, [space.height, space.width])
    pixels = torch.from_numpy(np.asarray(picture).copy())
    return pixels.reshape(space.height, space.width, space.channels).permute(2, 0, 1).contiguous()
