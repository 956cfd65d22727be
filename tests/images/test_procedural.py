"""Images that are drawn from models of pictures."""

from __future__ import annotations

import math

import pytest
import torch

from raydfkd.config.schema import ImageSpace
from raydfkd.images import procedural
from raydfkd.images.procedural import MODELS, Canvas, plain_grounds
from raydfkd.seeds import rng_from


def canvas_of(count=16, channels=1, height=20, width=20, seed=0, plain=(0.0, 0.0)):
    return Canvas(count=count, channels=channels, height=height, width=width, rng=rng_from(seed), plain=plain)


@pytest.mark.parametrize("shape", [(1, 20, 20), (3, 32, 24), (4, 7, 7), (3, 9, 31)])
@pytest.mark.parametrize("model", MODELS)
def test_images_are_in_range_differ_and_follow_from_the_seed(model, shape):
    channels, height, width = shape
    one, same, other = (
        MODELS[model](canvas_of(8, channels, height, width, seed)).expand(8, *shape) for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert 0 <= one.min() < one.max() <= 1
    assert len({tuple(image.flatten().tolist()) for image in one}) > 6
    if channels > 1:
        assert not torch.equal(one[:, 0], one[:, 1]), "they are coloured"


@pytest.mark.parametrize("model", ["dead_leaves", "strokes", "figures"])
@pytest.mark.parametrize(("plain", "tone"), [((1.0, 0.0), 0.0), ((0.0, 1.0), 1.0)])
def test_ground_is_plain_where_it_is_to_be(model, plain, tone):
    images = MODELS[model](canvas_of(64, plain=plain))
    assert (images == tone).flatten(1).float().mean() > 0.3
    drawn = MODELS[model](canvas_of(64))
    assert (drawn == tone).float().mean() < 0.1


def test_noise_has_the_spectrum_that_was_drawn(monkeypatch):
    monkeypatch.setattr(Canvas, "uniform", lambda self, low=0.0, high=1.0, channels=1: torch.full((1, 1, 1, 1), low))
    monkeypatch.setattr(Canvas, "tone", lambda self: torch.tensor(0.5))
    images = procedural.spectrum(canvas_of(200, height=64, width=64))  # the exponent is the least, 0.5
    power = torch.fft.rfft2(images).abs().square().mean((0, 1))
    assert (power[0, 4] / power[0, 16]).log2() / 2 == pytest.approx(1.0, abs=0.15), "f^-1 in power"


def test_a_shape_covers_as_many_pixels_as_it_has_area():
    canvas = canvas_of(2, height=50, width=50)
    one = torch.ones(2, 1, 1, 1)
    boxes = torch.tensor([True, False]).view(2, 1, 1, 1)
    shape = procedural._Shape(
        middle=(0.5 * one, 0.5 * one), radii=(0.3 * one, 0.2 * one), angle=0.4 * one, is_box=boxes
    )
    covered = shape.covers(canvas, *canvas.places()).sum((1, 2, 3)) / 50**2
    assert covered.tolist() == pytest.approx([4 * 0.3 * 0.2, math.pi * 0.3 * 0.2], rel=0.05)


def test_a_straight_stroke_is_as_wide_as_it_is_thick():
    canvas = canvas_of(1, height=60, width=60)
    ends = [torch.tensor([[x, 0.5]]).view(1, 2, 1, 1) for x in torch.linspace(-0.2, 1.2, 60).tolist()]
    curve = procedural._Curve(points=tuple(ends))
    covered = curve.covers(canvas, *canvas.places(), torch.full((1, 1, 1, 1), 0.1)).mean()
    assert covered.item() == pytest.approx(0.2, rel=0.05)


def test_figures_are_mirrored_half_the_time():
    images = procedural.figures(canvas_of(400, height=16, width=16, plain=(1.0, 0.0)))
    is_there = images.amax((1, 2, 3)) > 0.1
    outlines = (images > 0).float()
    mirrored = (outlines - outlines.flip(3)).abs().amax((1, 2, 3)) == 0
    assert 0.3 < mirrored[is_there].float().mean() < 0.75


SPACES = {
    "digits": ((0.1307,), (0.3081,), (0.5, 0.0)),
    "garments": ((0.219,), (0.3318,), (0.5, 0.0)),
    "photographs": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.0, 0.0)),
    "pages": ((0.9,), (0.25,), (0.0, 0.5)),
    "a half": ((0.5,), (0.5,), (0.25, 0.25)),
    "no statistics": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.25, 0.25)),
}


@pytest.mark.parametrize("space", SPACES)
def test_ground_follows_from_the_constants_of_the_teacher(space):
    mean, std, (black, white) = SPACES[space]
    found = plain_grounds(ImageSpace(channels=len(mean), size=8, mean=mean, std=std))
    assert found == pytest.approx((black, white), abs=0.06)
