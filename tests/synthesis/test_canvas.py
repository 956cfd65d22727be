from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from toy import batches_of, joined, toy_recipe, unit_of

from raydfkd.errors import RecipeError
from raydfkd.images.pixels import BLACK, WHITE
from raydfkd.synthesis.canvas import Canvas, Stage

WHOLE, HALF, ODD = Stage(steps=1), Stage(steps=1, pool=2), Stage(steps=1, size=7)


@pytest.fixture
def start():
    return torch.randn(3, 1, 20, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_images_begin_as_what_they_start_from_whatever_the_octaves(start, count):
    canvas = Canvas.begin(start, count)
    assert len(canvas.octaves) == count
    assert canvas.octaves[-1].shape[2:] == (-(-20 // 2 ** (count - 1)), -(-12 // 2 ** (count - 1)))
    torch.testing.assert_close(canvas.images(WHOLE), start)
    torch.testing.assert_close(canvas.seen(WHOLE), start)


def test_one_octave_is_averaged_over_squares_where_a_stage_pools(start):
    torch.testing.assert_close(Canvas.begin(start, 1).seen(HALF), F.avg_pool2d(start, 2))


def test_stage_sees_and_changes_no_octave_that_is_finer_than_itself(start):
    canvas = Canvas.begin(start, 3)
    assert [octave.shape[2] for octave in canvas.within(HALF)] == [10, 5]
    seen = canvas.seen(HALF)
    assert seen.shape == (3, 1, 10, 6)
    enlarged = F.interpolate(canvas.octaves[2], size=(10, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(seen, canvas.octaves[1] + enlarged)
    seen.sum().backward()
    assert canvas.octaves[0].grad is None
    whole = F.interpolate(seen, size=(20, 12), mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(canvas.images(HALF), whole.detach())


def test_stage_smaller_than_every_octave_sees_the_coarsest_one(start):
    assert Canvas.begin(start, 2).seen(ODD).shape == (3, 1, 7, 7)


@pytest.mark.parametrize(("count", "stage"), [(1, WHOLE), (3, WHOLE), (3, HALF)])
def test_clip_brings_what_is_seen_between_black_and_white_and_leaves_the_rest(start, count, stage):
    canvas = Canvas.begin(10 * start, count)
    before = canvas.seen(stage).detach()
    canvas.clip(stage)
    torch.testing.assert_close(canvas.seen(stage).detach(), before.clamp(BLACK, WHITE))


def test_images_of_several_octaves_are_smoother_than_those_of_one(tmp_path):
    """The teacher finds the class in both."""
    roughness = []
    for octaves in (1, 3):
        settings = [f"synthesis.octaves={octaves}", "synthesis.objective=[cross_entropy]", "synthesis.augment=[]"]
        recipe = toy_recipe(tmp_path, [*settings, "synthesis.stages=[{pool: 2, steps: 20}, {steps: 40}]"])
        made = joined(batches_of(recipe, unit_of((3, 1), 4)))
        assert (made.teacher_logits.argmax(1) == made.labels).float().mean() > 0.7
        images = made.images.float()
        roughness.append((images[..., 1:] - images[..., :-1]).square().mean().sqrt() / images.std())
    assert roughness[1] < 0.8 * roughness[0]


def test_more_octaves_than_the_image_has_pixels_to_halve_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="octaves is 5, but image size 8 has only 4; use fewer"):
        batches_of(toy_recipe(tmp_path, ["synthesis.octaves=5"]))
