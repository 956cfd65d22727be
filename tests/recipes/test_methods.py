"""Every packaged method: a page that says where it comes from, and that runs."""

from __future__ import annotations

import re

import pytest
from toy import SPACE, toy_recipe

from raydfkd.config.load import RECIPES, load_with_method, method_of, packaged_methods
from raydfkd.runner.budget import run_within
from raydfkd.runner.check import check

FOR_TRANSFORMERS = {"vit_patch_similarity"}
METHODS = [name for name in packaged_methods() if name not in FOR_TRANSFORMERS]
LINES = 40


def page(method):
    return (RECIPES / "methods" / f"{method}.yaml").read_text()


@pytest.mark.parametrize("method", packaged_methods())
def test_method_is_a_page_whose_head_says_source_command_and_trials(method):
    text = page(method)
    head = re.match(r"(#.*\n)+", text)[0]
    assert len(text.splitlines()) <= LINES
    assert re.search(r"\b(19|20)\d\d\b", head), "the year of a paper"
    assert re.search(r"^#   (raydfkd .*|a recipe of your own .*)", head, flags=re.MULTILINE)
    assert "Trials:" in head


def short(method):
    """Settings under which the method takes a moment on the toy teacher."""
    synthesis = method_of(method)["synthesis"]
    half = f"synthesis.size={SPACE.height // 2}"
    if synthesis.get("synthesizer", "generator") in ("noise_images", "procedural_images"):
        return []
    if "stages" in synthesis:
        return ["synthesis.stages=[{steps: 2}]", "synthesis.batch_size=8", "synthesis.warmup=0"]
    settings = [
        *("synthesis.steps=2", "synthesis.batch_per_class=2", "synthesis.generator.width=4"),
        *("synthesis.generator.latent=4", "synthesis.generator.doublings=1"),
    ]
    settings += ["synthesis.renewal.steps=2"] if "renewal" in synthesis else ["synthesis.emissions=1"]
    return [*settings, half] if method == "low_resolution" else settings


@pytest.mark.parametrize("method", METHODS)
def test_method_makes_images_and_a_student_on_a_teacher_of_somebodys(tmp_path, method):
    base = toy_recipe(tmp_path)
    settings = [
        *(f"teacher.weights={base.teacher.weights}", "distill.batch_size=4", "transfer_set.unit.classes=4"),
        *("runtime.device=cpu", "distill.holdout=0"),
        *short(method),
    ]
    recipe = load_with_method(str(tmp_path / "toy.yaml"), method, settings, run_dir=str(tmp_path / "run"))
    check(recipe)
    outcome = run_within(recipe, 0.05)
    assert outcome.images > 0
    assert outcome.student_steps >= recipe.rounds
    assert outcome.student.is_file()


@pytest.mark.parametrize("method", FOR_TRANSFORMERS)
def test_method_for_transformers_says_that_it_is_for_them(method):
    assert "transformer" in page(method)
