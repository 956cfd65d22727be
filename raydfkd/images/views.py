"""Views of images: each augmented from a seed of its own, so that the same crops come again without being kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raydfkd.config.schema import PluginSpec
from raydfkd.errors import RecipeError
from raydfkd.images.augment import AUGMENTATIONS, Chain, takes_progress
from raydfkd.seeds import rng_from


def views_of(images: Tensor, seeds: Tensor, augment: Chain) -> Tensor:
    """A view of each of ``images`` [N, C, H, W], nominal: augmented by itself, from its own one of ``seeds`` [N]."""
    pairs = zip(images.split(1), seeds.tolist(), strict=True)
    return torch.cat([augment(image, rng_from(seed)) for image, seed in pairs])


def refuse_unnameable(augment: Sequence[PluginSpec], *, where: str, who: str) -> None:
    """Refuse augmentations whose views of an image do not follow from a seed of its own, and a list that makes none.

    Raises:
        RecipeError: ``augment``, at the key ``where``, is not what ``who`` needs.
    """
    if not augment:
        raise RecipeError(f"{where} is empty, so all views of an image are alike, but {who} needs several; add one")
    for index, spec in enumerate(augment):
        factory = AUGMENTATIONS.get(spec.kind, where=f"{where}[{index}]")
        if getattr(factory, "mixes_images", False):
            raise RecipeError(f"{where}[{index}]: {spec.kind} mixes images, but {who} needs views of one each; drop it")
        if takes_progress(AUGMENTATIONS.build(spec.kind, spec.options, where=f"{where}[{index}]")):
            raise RecipeError(
                f"{where}[{index}]: {spec.kind} changes over the steps, but {who} sees the same views again; drop it"
            )
