"""What a recipe alone shows to be wrong: names and options of plug-ins. No plug-in, network or file is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raydfkd.catalog import declared
from raydfkd.recipe import Recipe
from raydfkd.sections import PluginSpec, StudentSpec, TeacherSpec


def static_check(recipe: Recipe) -> None:
    """Find unknown names and unfit options of plug-ins, by the rules and in the words of ``pipeline.check``.

    What takes more than the recipe is left to that: whether parts suit each other, rules in constructors, networks
    given as ``module:callable`` or ``torchvision:NAME``, files and devices.

    Raises:
        RecipeError: with key, value and remedy.
    """
    synthesis, distill = recipe.synthesis, recipe.distill
    _check_network(recipe.teacher, "teacher")
    _check_plugin("targets", synthesis.targets, "synthesis.targets")
    for index, term in enumerate(synthesis.objective):
        _check("terms", term.term, term.options, f"synthesis.objective[{index}]")
    _check_augmentations(synthesis.augment, "synthesis.augment")
    _check("synthesizers", synthesis.synthesizer, synthesis.options, "synthesis")
    if recipe.real_data is not None:
        _check_plugin("real_data", recipe.real_data, "real_data")
    _check_network(recipe.student, "student")
    _check_plugin("criteria", distill.criterion, "distill.criterion")
    _check_augmentations(distill.augment, "distill.augment")
    if recipe.teacher.train is not None:
        _check_augmentations(recipe.teacher.train.augment, "teacher.train.augment")


def _check_network(spec: TeacherSpec | StudentSpec, where: str) -> None:
    if ":" not in spec.network:
        declared("networks").require(spec.network, where=f"{where}.network")
        _check("networks", spec.network, spec.options, f"{where}.options")


def _check_augmentations(specs: Sequence[PluginSpec], where: str) -> None:
    for index, spec in enumerate(specs):
        _check_plugin("augmentations", spec, f"{where}[{index}]")


def _check_plugin(family: str, spec: PluginSpec, where: str) -> None:
    _check(family, spec.kind, spec.options, where)


def _check(family: str, name: str, options: Mapping[str, Any], where: str) -> None:
    checked = declared(family).check(name, options, where=where)
    for option, value in checked.items():
        if isinstance(value, PluginSpec):  # a plug-in inside another is an option named after its family
            _check_plugin(f"{option}s", value, f"{where}.{option}")
