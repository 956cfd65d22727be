"""Class embeddings from a file: vectors that say of each class how it relates to the others."""

from __future__ import annotations

import hashlib
import io
import pickle

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from raydfkd.config.recipe import Recipe
from raydfkd.errors import RecipeError, one_line
from raydfkd.networks.weights import read_weights

_KEY = "synthesis.embeddings"


def embeddings_of(recipe: Recipe) -> Tensor | None:
    """The recipe's embeddings [K, D], one of each of the teacher's classes; None where it names none.

    Raises:
        RecipeError: there is no such file, it holds something else, or vectors of another number of classes.
    """
    uri = recipe.synthesis.embeddings
    if uri is None:
        return None
    vectors = _read(read_weights(uri, where=_KEY), uri)
    classes = recipe.teacher.classes
    if vectors.ndim != 2 or len(vectors) != classes:
        shape = list(vectors.shape)
        raise RecipeError(
            f"{_KEY} is {uri!r}, which holds {shape}, but the teacher has {classes} classes; give a row each"
        )
    if not vectors.isfinite().all() or not vectors.any(1).all():
        raise RecipeError(f"{_KEY} is {uri!r}, in which a vector is zero or not finite; give one of each class")
    return vectors


def digest_of_embeddings(recipe: Recipe) -> str | None:
    """SHA-256 of the file of the recipe's embeddings; None where it names none."""
    uri = recipe.synthesis.embeddings
    return None if uri is None else hashlib.sha256(read_weights(uri, where=_KEY)).hexdigest()


def outside_knowledge(recipe: Recipe) -> str | None:
    """Says that classes are described by something that no teacher has told; None where they are not."""
    uri = recipe.synthesis.embeddings
    return None if uri is None else f"the generator is told its classes by embeddings from {uri}, outside knowledge"


def _read(content: bytes, uri: str) -> Tensor:
    try:
        if uri.endswith(".npy"):
            return torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False)).float()
        found = (
            safetensors.torch.load(content)
            if uri.endswith(".safetensors")
            else torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        )
    except (
        SafetensorError,
        ValueError,
        OSError,
        EOFError,
        RuntimeError,
        pickle.UnpicklingError,
    ) as error:
        raise RecipeError(
            f"{_KEY} is {uri!r}, which cannot be read ({one_line(error)}); give .npy, .safetensors or .pt of one tensor"
        ) from None
    tensors = list(found.values()) if isinstance(found, dict) else [found]
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor):
        raise RecipeError(f"{_KEY} is {uri!r}, which holds {len(tensors)} tensors; give a file of one [classes, width]")
    return tensors[0].float()
