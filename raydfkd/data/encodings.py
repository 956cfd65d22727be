"""Images as bytes in a column: raw pixels, PNG, JPEG or WebP."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

EncodingKind = Literal["raw", "png", "jpeg", "webp"]
MODES = {1: "L", 3: "RGB"}
"""Names of Pillow's modes for images of so many channels."""
LOSSLESS = 100
"""Quality of WebP that stands for its lossless form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """Form in which pixels and logits of a part are stored."""

    kind: EncodingKind = "raw"
    """``png`` returns the pixels that were written, ``jpeg`` and ``webp`` others, close to them."""
    quality: int = 95
    """Quality of JPEG, 1 to 100, whose chroma is not subsampled, and of WebP, whose always is; WebP of 100 is lossless
    instead."""
    top_k: int | None = None
    """Logits of each image that are kept, the largest, with the level of the others; all of them unless given."""


def encode_images(images: Tensor, encoding: Encoding) -> list[bytes]:
    """Encode each of uint8 ``images`` [N, C, H, W] on the host as a file.

    Raises:
        ValueError: the images are neither grey nor RGB.
    """
    channels = images.shape[1]
    if channels not in MODES:
        raise ValueError(f"encoding {encoding.kind} stores 1 or 3 channels, but images have {channels}; use raw")
    options = _options(encoding)
    files = []
    for image in images.permute(0, 2, 3, 1).contiguous().numpy():
        file = io.BytesIO()
        Image.fromarray(image if channels > 1 else image[..., 0]).save(file, encoding.kind, **options)
        files.append(file.getvalue())
    return files


def _options(encoding: Encoding) -> dict[str, Any]:
    # No long search for repeats: optimised images are close to noise, so it only takes time.
    if encoding.kind == "png":
        return {"compress_type": zlib.Z_RLE}
    if encoding.kind == "jpeg":
        return {"quality": encoding.quality, "subsampling": 0}
    if encoding.quality == LOSSLESS:
        return {"lossless": True, "quality": 0, "method": 2}
    return {"quality": encoding.quality, "method": 2}


def decode_images(files: Iterable[bytes], kind: str, shape: tuple[int, ...]) -> Tensor:
    """Read files of images of one ``shape`` (C, H, W) as uint8 [N, C, H, W].

    Raises:
        ValueError: one of them is not such a file, or is of another size; its size is looked at before it is unpacked.
    """
    channels, height, width = shape
    images = []
    for number, file in enumerate(files):
        try:
            with Image.open(io.BytesIO(file), formats=[kind]) as image:
                mode = MODES.get(channels)
                stored = "RGB" if kind == "webp" and mode else mode  # it has no grey
                if (image.mode, image.size) != (stored, (width, height)):
                    raise ValueError(f"has an image {number} of {image.mode} {image.size} instead of {shape}")
                pixels = image if stored == mode else image.convert(mode)
                images.append(np.asarray(pixels).reshape(height, width, channels))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"has an image {number} that is no {kind} ({error})") from error
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
