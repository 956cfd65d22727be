"""Images that are drawn, with the teacher's answers."""

from __future__ import annotations

import pytest
import torch
from toy import batches_of, joined, toy_recipe

from raydfkd.errors import RecipeError
from raydfkd.images import procedural
from raydfkd.runner.check import check


def noise_recipe(folder, **options):
    options = {"synthesizer": "noise_images", "targets": "none", **options}
    text = ", ".join(f"{key}: {value}" for key, value in options.items())
    return toy_recipe(folder, [f"synthesis={{{text}}}", "transfer_set.unit.images_per_class=6"])


@pytest.mark.parametrize("batch_size", [5, 100])
def test_noise_is_labelled_by_the_teacher_and_has_the_form_asked_for(tmp_path, batch_size):
    recipe = noise_recipe(tmp_path, distribution="uniform", batch_size=batch_size)
    made = joined(batches_of(recipe))
    assert len(made) == recipe.plan()[0].request.count
    assert torch.equal(made.labels, made.teacher_logits.argmax(1))
    assert made.images.float().mean().item() == pytest.approx(127.5, abs=10)
    assert made.images.float().std().item() == pytest.approx(255 / 12**0.5, abs=8)


def test_gaussian_noise_has_the_standard_deviation_asked_for(tmp_path):
    made = joined(batches_of(noise_recipe(tmp_path, std=0.5)))
    assert made.images.float().std().item() == pytest.approx(0.5 * 0.225 * 255, rel=0.1)


WRONG = {
    "an objective": ({"objective": "[one_hot]"}, "objective has one_hot, but noise_images optimises nothing; drop it"),
    "targets": ({"targets": "balanced"}, "what is drawn has no class before the teacher sees it; use targets: none"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=list(WRONG))
def test_what_noise_cannot_follow_is_refused(tmp_path, options, message):
    with pytest.raises(RecipeError, match=message):
        check(noise_recipe(tmp_path, **options))


def test_objective_without_terms_is_refused_where_it_is_minimised(tmp_path):
    with pytest.raises(RecipeError, match="synthesis.objective is empty, but pixels minimises it; give terms"):
        check(toy_recipe(tmp_path, ["synthesis.objective=[]"]))


def drawn_recipe(folder, *settings, **options):
    options = {"synthesizer": "procedural_images", "targets": "none", **options}
    text = ", ".join(f"{key}: {value}" for key, value in options.items())
    return toy_recipe(folder, [f"synthesis={{{text}}}", "transfer_set.unit.images_per_class=6", *settings])


def test_models_of_pictures_draw_equal_parts_of_a_batch(tmp_path, monkeypatch):
    asked = []

    def model(name):
        def draw(canvas):
            asked.append((name, canvas.count, canvas.plain))
            return torch.full((canvas.count, 1, canvas.height, canvas.width), 0.5)

        return draw

    monkeypatch.setattr(procedural, "MODELS", {name: model(name) for name in procedural.MODELS})
    recipe = drawn_recipe(tmp_path, models="[strokes, spectrum]", black=0.25, batch_size=7)
    made = joined(batches_of(recipe))
    count = recipe.plan()[0].request.count
    assert (made.images == 127).all() or (made.images == 128).all()
    assert sum(number for name, number, _ in asked) == count
    assert asked[:2] == [("strokes", 3, (0.25, 0.0)), ("spectrum", 4, (0.25, 0.0))]


def test_ground_of_drawn_images_is_that_of_the_teachers_constants(tmp_path):
    made = joined(
        batches_of(drawn_recipe(tmp_path, "teacher.image_space.mean=[0.1]", "teacher.image_space.std=[0.29]"))
    )
    assert (made.images == 0).float().mean() > 0.15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": "[]"}, "synthesis.models.*at least 1"),
        ({"models": "[stroke]"}, "synthesis.models.*stroke"),
        ({"black": "1.5"}, "synthesis.black.*1.5"),
        ({"targets": "balanced"}, "what is drawn has no class before the teacher sees it; use targets: none"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, options, message):
    with pytest.raises(RecipeError, match=message):
        check(drawn_recipe(tmp_path, **options))
