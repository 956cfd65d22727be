"""Images that are made smaller than the teacher takes them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from toy import SPACE, SYNTHESIZERS_UNDER_TEST, batches_of, joined, toy_recipe

from raydfkd.config.schema import ImageSpace
from raydfkd.errors import RecipeError
from raydfkd.images.pixels import PixelRange, nominal_from_uint8
from raydfkd.job import open_job
from raydfkd.networks.teacher import open_teacher
from raydfkd.runner.run import run

HALF = f"synthesis.size={SPACE.height // 2}"


def recipe_of(folder, synthesizer, *settings):
    sizes = ["synthesis.stages=[{steps: 3}]"] if synthesizer == "pixels" else []
    return toy_recipe(folder, [HALF, *sizes, *settings], synthesizer=synthesizer)


@pytest.mark.parametrize("synthesizer", SYNTHESIZERS_UNDER_TEST)
def test_stored_logits_are_those_of_the_enlarged_images(tmp_path, synthesizer):
    recipe = recipe_of(tmp_path, synthesizer)
    made = joined(batches_of(recipe))
    assert made.images.shape[2:] == (SPACE.height // 2, SPACE.width // 2)
    large = F.interpolate(nominal_from_uint8(made.images), scale_factor=2, mode="bilinear")
    seen = PixelRange(recipe.teacher.image_space).from_nominal(large)
    with torch.no_grad():
        expected = open_teacher(recipe).module(seen)
    torch.testing.assert_close(made.teacher_logits.float(), expected, rtol=2e-3, atol=2e-3)


def test_student_learns_from_them_and_is_judged_on_them(tmp_path):
    recipe = recipe_of(tmp_path, "generator", "runtime.executor=local", "distill.steps=3")
    found = run(recipe).report
    assert found["judged_images"] == 0, "nothing was held out of so few"
    assert 0 < found["student_images"] == found["images"]


def test_averaged_images_stay_smaller_by_the_same_share():
    space = ImageSpace(channels=1, size=8, mean=(0.5,), std=(0.225,))
    pixels = PixelRange(space, made=space.model_copy(update={"size": 4}))
    assert pixels.from_nominal(torch.zeros(1, 1, 4, 4)).shape[2:] == (8, 8)
    assert pixels.from_nominal(torch.zeros(1, 1, 2, 2)).shape[2:] == (4, 4)


def test_size_changes_what_a_set_is_made_of(tmp_path):
    small, large = recipe_of(tmp_path, "generator"), toy_recipe(tmp_path, synthesizer="generator")
    assert open_job(small).digest != open_job(large).digest
    assert "size" not in open_job(large).made_of["synthesis"]


def test_more_pixels_than_the_teachers_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="synthesis.size is 64, more than the teacher's 8; give fewer"):
        toy_recipe(tmp_path, ["synthesis.size=64"])
