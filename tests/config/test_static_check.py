from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from raydfkd.config.load import load_recipe, packaged_recipes
from raydfkd.config.recipe import Recipe
from raydfkd.config.schema import PluginSpec, TermSpec
from raydfkd.config.static_check import static_check
from raydfkd.errors import RecipeError
from raydfkd.runner import check as in_check

SMALL = ("teacher.options.widths=[4]", "student.options.widths=[4]", "runtime.device=cpu")
WRONG = {
    "synthesis.targets": ["balancd", "{kind: balanced, share: 1}"],
    "synthesis.objective": [
        "[cross_entrpy]",
        "[cross_entropy, {term: bn_moments, fom: kl}]",
        "[{term: bn_moments, form: l1}]",
        "[{term: bn_moments, first_layer_scale: .inf}]",
    ],
    "synthesis.augment": ["[jiter]", "[{kind: jitter, pixels: -1}]", "[{kind: jitter}]", "[flip, {kind: flip, p: 1}]"],
    "synthesis.synthesizer": ["generators"],
    "synthesis.steps": ["0", "1.5", "many"],
    "synthesis.step": ["4"],
    "synthesis.betas": ["[0.5]", "[0.5, 1.0]"],
    "synthesis.generator": ["con", "{kind: conv, latnt: 4}", "{kind: conv, width: 0}", "3"],
    "real_data": [
        "digit",
        "{kind: digits, root: x}",
        "{kind: fashion_mnist, download: maybe}",
        "{kind: image_folder, root: x, crop: 2}",
        "{kind: image_folder, rot: x}",
        "{kind: image_folder, root: x, splits: {dev: val}}",
        "{kind: image_folder, root: x, splits: {train: 1.5}}",
        "{kind: image_folder, root: x, classes: {crow: -1}}",
        "{kind: parquet}",
        "{kind: huggingface, name: x, split: test}",
        "{kind: 'torchvision:CIFAR11', root: x}",
        "{kind: 'torchvision:CIFAR10', rot: x}",
    ],
    "teacher.network": ["convnt", "lenet5"],
    "teacher.options": ["{widths: [0]}", "{width: [4]}"],
    "student.network": ["convnt"],
    "student.options": ["{widths: 4}", "{depth: 8}"],
    "synthesis.beside": [
        "[generators]",
        "[{kind: noise_images, targets: none, stdd: 2}]",
        "[{kind: noise_images, targets: none, std: 0}]",
        "[{kind: noise_images, targets: non}]",
        "[{kind: pixels, stages: [{steps: 2}], batch_size: 4, objective: [cross_entrpy]}]",
        "[{kind: pixels, stages: [{steps: 2}], batch_size: 4, objective: [cross_entropy], augment: [jiter]}]",
        "[{kind: noise_images, targets: none, select: randm}]",
    ],
    "distill.criterion": ["soft_k", "{kind: soft_kl, temprature: 4}", "{kind: soft_kl, direction: up}"],
    "distill.source": [
        "grown",
        "{kind: growing, window: 4}",
        "{kind: growing, wait_for: 0}",
        "{kind: snapshot, complete_by: 0.5}",
        "{kind: growing, complete_by: 1.5}",
        "{kind: growing, refresh_steps: often}",
    ],
    "distill.augment": ["[nois]", "[{kind: noise}]", "[{kind: mixup, alpha: 0}]"],
    "teacher.train.augment": ["[affin]", "[{kind: affine, scale: 1}]"],
}
CASES = [f"{key}={value}" for key, values in WRONG.items() for value in values]


def plugin_keys(model: type[BaseModel], where: str = "") -> Iterator[str]:
    """Keys of a recipe at which plug-ins are named."""
    for name, field in model.model_fields.items():
        key = f"{where}{name}"
        for inner in classes_in(field.annotation):
            if inner in (PluginSpec, TermSpec):
                yield key
            else:
                yield from plugin_keys(inner, f"{key}.")


def classes_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from classes_in(argument)


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipe_is_sound(name):
    static_check(load_recipe(name))


def test_every_key_that_names_a_plugin_is_looked_at():
    inside = {f"synthesis.beside.{key}" for key in ("augment", "objective", "targets")}  # of an entry of that list
    assert set(plugin_keys(Recipe)) <= WRONG.keys() | inside


@pytest.mark.parametrize("override", CASES)
def test_mistake_is_refused_in_the_words_of_the_check_that_builds_everything(tmp_path, override):
    recipe = load_recipe("digits-generators", [*SMALL, override], str(tmp_path / "run"))
    with pytest.raises(RecipeError) as static:
        static_check(recipe)
    with pytest.raises(RecipeError) as full:
        in_check.check(recipe)
    assert str(static.value) == str(full.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.source=grown", "distill.source: unknown source 'grown'; did you mean growing?"),
        ("distill.source.kind=grown", "distill.source: unknown source 'grown'; did you mean growing?"),
        ("distill.source.window=4", "distill.source.window: unknown key; did you mean window_rows?"),
    ],
)
def test_mistake_in_the_source_is_named_with_the_closest_word(override, message):
    with pytest.raises(RecipeError) as error:
        static_check(load_recipe("digits-generators", [override]))
    assert str(error.value) == message


@pytest.mark.parametrize("network", ["nosuch:build", "torchvision:nosuch", "os:getcwd"])
def test_network_that_is_code_is_left_alone(network):
    static_check(load_recipe("digits-generators", [f"teacher.network={network}", f"student.network={network}"]))
