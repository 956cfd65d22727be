"""The trained network that is to be inverted, opened once and handed on."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from raydfkd.config.recipe import Recipe
from raydfkd.networks.build import build_network
from raydfkd.networks.weights import load_weights
from raydfkd.seeds import derive_seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """A trained network and what names its weights.

    Whoever observes the module makes a frozen copy of it; nobody changes it.
    """

    module: nn.Module
    """In eval mode, on the CPU."""
    sha256: str
    """Of the file of its weights."""


def build_teacher(recipe: Recipe) -> nn.Module:
    """The recipe's teacher with fresh weights, which follow from the recipe's seed."""
    return build_network(recipe.teacher, recipe.teacher, where="teacher", seed=derive_seed(recipe.seed, "teacher"))


def open_teacher(
    recipe: Recipe, network: nn.Module | None = None, *, say: Callable[[str], None] = logger.info
) -> Teacher:
    """Read the recipe's weights into ``network``, or into one that is built for them.

    ``say`` is told where the file's names or form are not quite the network's.

    Raises:
        RecipeError: network or weights are missing, or do not suit each other.
    """
    network = build_teacher(recipe) if network is None else network
    sha256 = load_weights(network, recipe.teacher.weights, where="teacher.weights", say=say)
    return Teacher(module=network.eval(), sha256=sha256)


def taught_teacher(network: nn.Module, weights: bytes) -> Teacher:
    """A network that was trained just now, whose ``weights`` are those of its file."""
    return Teacher(module=network.eval(), sha256=hashlib.sha256(weights).hexdigest())
