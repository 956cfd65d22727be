"""The network that judges synthetic images beside the teacher, who made them: another one, trained by itself."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from raydfkd.config.recipe import Recipe
from raydfkd.config.schema import ImageSpace, VerifierSpec
from raydfkd.errors import MissingError, RecipeError
from raydfkd.networks.build import build_network
from raydfkd.networks.libraries import described
from raydfkd.networks.weights import load_weights, weights_exist
from raydfkd.seeds import derive_seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifier:
    """A trained network over the teacher's classes, which has had no part in making the images."""

    module: nn.Module
    """In eval mode, on the CPU; answers logits [N, K]."""
    name: str
    """As the recipe has it."""
    space: ImageSpace
    """Of the images that it takes."""
    sha256: str
    """Of the file of its weights."""


def open_verifier(recipe: Recipe, spec: VerifierSpec) -> Verifier:
    """Build the verifier of ``recipe`` and read its weights.

    Raises:
        MissingError: its package is not installed, its weights are not there, or their hub is out of reach.
        RecipeError: it is not what the recipe says: another class count, weights of another network.
    """
    try:
        return _opened(recipe, spec)
    except RecipeError as error:
        blamed = [re.sub(r"\bteacher\.", "verifier.", line) for line in error.lines]
        raise type(error)(*blamed) from error


def _opened(recipe: Recipe, spec: VerifierSpec) -> Verifier:
    if spec.classes is None or spec.image_space is None:
        described(
            spec.model_dump(mode="json", exclude_none=True), "verifier"
        )  # says what is missing, where that is why
        raise RecipeError(
            f"verifier.classes or image_space is missing, and its library does not know it of {spec.network}; give both"
        )
    network = build_network(
        spec.as_teacher, spec.as_teacher, where="verifier", seed=derive_seed(recipe.seed, "verifier")
    )
    if not weights_exist(spec.weights, where="verifier.weights"):
        raise MissingError(
            f"verifier.weights is {spec.weights!r}: no such file; give trained weights of {spec.network}, or drop "
            "verifier"
        )
    sha256 = load_weights(network, spec.weights, where="verifier.weights")
    return Verifier(module=network.eval(), name=spec.network, space=spec.image_space, sha256=sha256)
