"""Whether the methods that come with raydfkd suit the teacher of a recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from raydfkd.config.load import method_data, packaged_methods
from raydfkd.config.recipe import Recipe
from raydfkd.errors import RecipeError
from raydfkd.networks.teacher import build_teacher
from raydfkd.synthesis.build import build_synthesizer


def suits(recipe: Recipe, teacher: nn.Module | None = None) -> Iterator[tuple[str, str]]:
    """Yield each packaged method and why it does not suit the recipe's teacher; nothing where it does.

    A method suits where its synthesis can be put together for the teacher; whether the student becomes good is another
    question.

    Args:
        recipe: whose teacher, student and set are taken as they are.
        teacher: built, with any weights; built here unless given.
    """
    network = build_teacher(recipe) if teacher is None else teacher
    for method in packaged_methods():
        try:
            build_synthesizer(with_synthesis(recipe, method_data(method)["synthesis"]), network, torch.device("cpu"))
        except RecipeError as error:
            yield method, error.lines[0]
        else:
            yield method, ""


def with_synthesis(recipe: Recipe, synthesis: Mapping[str, Any]) -> Recipe:
    """The recipe with another section ``synthesis``."""
    return Recipe.model_validate_json(json.dumps({**recipe.model_dump(mode="json"), "synthesis": dict(synthesis)}))
