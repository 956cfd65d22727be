"""Whether the methods that come with raydfkd suit the teacher of a recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from raydfkd.config.load import packaged_methods, page_data
from raydfkd.config.recipe import Recipe
from raydfkd.errors import RecipeError
from raydfkd.networks.build import build_network
from raydfkd.networks.teacher import build_teacher
from raydfkd.runner.check import check_synthesis


def suits(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield each packaged method and why it does not suit the recipe's teacher; nothing where it does.

    A method suits where its synthesis can be put together for the teacher; whether the student becomes good is another
    question.

    Args:
        recipe: whose teacher, student and set are taken as they are.
    """
    network, student = build_teacher(recipe), _student_of(recipe)
    for method in packaged_methods():
        yield method, _why_not(with_method(recipe, page_data(method)), network, student)


def why_not(recipe: Recipe) -> str:
    """Why the recipe's method does not suit its teacher; nothing where it does."""
    return _why_not(recipe, build_teacher(recipe), _student_of(recipe))


def _student_of(recipe: Recipe) -> nn.Module:
    return build_network(recipe.student, recipe.teacher, where="student", seed=0)


def _why_not(recipe: Recipe, teacher: nn.Module, student: nn.Module) -> str:
    try:
        check_synthesis(recipe, teacher, student)
    except RecipeError as error:
        return error.lines[0]
    return ""


def with_method(recipe: Recipe, method: Mapping[str, Any]) -> Recipe:
    """The recipe with another method's synthesis, source and rounds, in one process."""
    data = recipe.model_dump(mode="json")
    source = method.get("distill", {}).get("source", "growing")
    is_live = "live" in (source, source.get("kind") if isinstance(source, dict) else None)
    rounds = method.get("rounds", 1)
    spec = data["transfer_set"]
    spec["images_per_class"] = 0 if is_live else rounds * spec["unit"]["images_per_class"]
    data |= {"synthesis": dict(method["synthesis"]), "rounds": rounds}
    data["distill"] = {**data["distill"], "source": source, "steps": max(rounds, data["distill"]["steps"])}
    data["runtime"]["executor"] = "local"
    return Recipe.model_validate_json(json.dumps(data))
