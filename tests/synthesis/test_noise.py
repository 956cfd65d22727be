"""Images of noise with the teacher's answers."""

from __future__ import annotations

import pytest
import torch
from toy import batches_of, joined, toy_recipe

from raydfkd.errors import RecipeError
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
    "targets": ({"targets": "balanced"}, "noise has no class before the teacher sees it; use targets: none"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=list(WRONG))
def test_what_noise_cannot_follow_is_refused(tmp_path, options, message):
    with pytest.raises(RecipeError, match=message):
        check(noise_recipe(tmp_path, **options))


def test_objective_without_terms_is_refused_where_it_is_minimised(tmp_path):
    with pytest.raises(RecipeError, match="synthesis.objective is empty, but pixels minimises it; give terms"):
        check(toy_recipe(tmp_path, ["synthesis.objective=[]"]))
