from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from raydfkd.data.encodings import Encoding, decode_images, encode_images


def noise(count, channels, height=9, width=7):
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=rng)


def gradient(channels):
    ramp = torch.linspace(0, 255, 32).expand(2, channels, 24, 32)
    return (ramp * torch.linspace(0.3, 1, 24).view(1, 1, 24, 1)).to(torch.uint8)


LOSSLESS = [Encoding(kind="png"), Encoding(kind="png", quality=1), Encoding(kind="webp", quality=100)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("encoding", LOSSLESS, ids=["png", "png-1", "webp-100"])
def test_png_and_webp_of_quality_100_have_every_pixel_as_it_was(encoding, channels):
    images = noise(3, channels)
    assert torch.equal(decode_images(encode_images(images, encoding), encoding.kind, (channels, 9, 7)), images)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_jpeg_and_webp_are_close_and_closer_with_more_quality(kind, channels):
    images, errors = gradient(channels), []
    for quality in (50, 95):
        files = encode_images(images, Encoding(kind=kind, quality=quality))
        decoded = decode_images(files, kind, (channels, 24, 32))
        errors.append((decoded.float() - images.float()).abs().mean().item())
    assert errors[1] < errors[0] < 4
    assert errors[1] < 1.5


def test_jpeg_keeps_colours_of_single_pixels_apart():
    """Chroma of half the size, the usual default, would smear them."""
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    images[:, 0, :, ::2] = 255
    images[:, 2, :, 1::2] = 255
    decoded = decode_images(encode_images(images, Encoding(kind="jpeg")), "jpeg", (3, 8, 8))
    assert (decoded.int() - images.int()).abs().max() < 60


def test_webp_takes_less_than_jpeg_of_the_same_quality():
    images = gradient(3)
    jpeg, webp = (encode_images(images, Encoding(kind=kind, quality=75)) for kind in ("jpeg", "webp"))
    assert sum(map(len, webp)) < sum(map(len, jpeg))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_other_numbers_of_channels_are_refused(kind):
    with pytest.raises(ValueError, match=f"encoding {kind} stores 1 or 3 channels, but images have 4; use raw"):
        encode_images(noise(1, 4), Encoding(kind=kind))


@pytest.mark.parametrize("shape", [(3, 7, 9), (1, 9, 7), (3, 9, 8)])
def test_image_of_another_shape_is_named(shape):
    files = encode_images(noise(2, 3), Encoding(kind="png"))
    with pytest.raises(ValueError, match=r"has an image 0 of RGB \(7, 9\) instead of"):
        decode_images(files, "png", shape)


@pytest.mark.parametrize("damage", [lambda file: b"", lambda file: file[:-30], lambda file: b"GIF89a" + file])
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_damaged_image_is_named(damage, kind):
    first, second = encode_images(noise(2, 3), Encoding(kind=kind))
    with pytest.raises(ValueError, match=f"has an image 1 that is no {kind}"):
        decode_images([first, damage(second)], kind, (3, 9, 7))


def test_file_of_another_kind_is_not_opened():
    file = io.BytesIO()
    Image.new("RGB", (7, 9)).save(file, "bmp")
    with pytest.raises(ValueError, match="has an image 0 that is no png"):
        decode_images([file.getvalue()], "png", (3, 9, 7))


def test_webp_of_an_absurd_canvas_is_refused_before_it_is_unpacked():
    """Its first bytes claim 16,383 pixels across and down, its only frame has 8."""
    (whole,) = encode_images(noise(1, 3, 8, 8), Encoding(kind="webp"))
    size = (16_382).to_bytes(3, "little")
    frame = bytes(6) + 2 * (7).to_bytes(3, "little") + bytes(4) + whole[12:]
    body = b"WEBPVP8X\x0a\0\0\0\x02\0\0\0" + size + size + b"ANIM\x06\0\0\0" + bytes(6)
    body += b"ANMF" + len(frame).to_bytes(4, "little") + frame
    bomb = b"RIFF" + len(body).to_bytes(4, "little") + body
    with pytest.raises(ValueError, match=r"has an image 0 that is no webp \(Image size \(268402689 pixels\)"):
        decode_images([bomb], "webp", (3, 8, 8))


def test_webp_with_transparency_is_none_of_ours():
    file = io.BytesIO()
    Image.new("RGBA", (7, 9)).save(file, "webp")
    with pytest.raises(ValueError, match=r"has an image 0 of RGBA \(7, 9\) instead of"):
        decode_images([file.getvalue()], "webp", (3, 9, 7))
