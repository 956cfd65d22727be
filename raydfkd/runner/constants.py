"""What nobody has told of a teacher: size and normalisation, by labelled pictures, and a temperature, by noise."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from raydfkd.config.schema import IMAGENET_MEAN, IMAGENET_STD, ImageSpace, PluginSpec, TeacherSpec
from raydfkd.images.pictures import pictures_in
from raydfkd.images.pixels import PixelRange
from raydfkd.images.real_data import in_memory, open_real_data
from raydfkd.networks.build import build_network
from raydfkd.networks.hardness import temperature_for
from raydfkd.networks.scout import GUESS, Found
from raydfkd.networks.weights import load_weights
from raydfkd.seeds import rng_from

PICTURES = 200
"""Pictures that are looked at at most."""
CONSTANTS: Mapping[int, tuple[tuple[str, tuple[float, ...], tuple[float, ...]], ...]] = {
    3: (
        ("ImageNet's", IMAGENET_MEAN, IMAGENET_STD),
        ("from -1 to 1", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("from 0 to 1", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        ("CIFAR-10's", (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
        ("from 0 to 255", (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
    ),
    1: (
        ("from -1 to 1", (0.5,), (0.5,)),
        ("from 0 to 1", (0.0,), (1.0,)),
        ("MNIST's", (0.1307,), (0.3081,)),
        ("Fashion-MNIST's", (0.286,), (0.353,)),
        ("from 0 to 255", (0.0,), (1 / 255,)),
    ),
}
"""Usual constants by the number of channels, with their names."""


def fit_to_pictures(found: Found, root: str) -> Found:
    """``found`` with a size and constants that were guesses replaced by what labelled pictures tell.

    The size is theirs where all have the same one and the network takes it. The constants are those of the usual ones
    with which the teacher knows most of up to 200 of them; the same pictures judge the student later. Where it knows
    hardly more than chance, ``notes`` say so.

    Raises:
        RecipeError: there are no such pictures, their classes are not the teacher's, or its weights do not fit it.
    """
    section, sources = dict(found.section), dict(found.sources)
    section["image_space"] = dict(section["image_space"])
    if sources.get("size", "").startswith(GUESS):
        size = _common_size(Path(root))
        if size is not None and found.takes(size):
            section["image_space"]["size"], sources["size"] = size, "that of the pictures in --data"
    space = ImageSpace.model_validate_json(json.dumps(section["image_space"]))
    images, labels = _pictures(section, space, root)
    candidates = [("as it says", space.mean, space.std)]
    if sources.get("mean", "").startswith(GUESS):
        candidates = [*CONSTANTS.get(space.channels, ()), ("their own", *_moments(images))]
    network = _teacher(TeacherSpec.model_validate_json(json.dumps(section)))
    known = [
        (_accuracy(network, space.model_copy(update={"mean": mean, "std": std}), images, labels), name, mean, std)
        for name, mean, std in candidates
    ]
    accuracy, name, mean, std = max(known, key=lambda tried: tried[0])
    if len(known) > 1:
        section["image_space"] |= {"mean": list(mean), "std": list(std)}
        sources["mean"] = (
            f"{name}: the teacher knows {accuracy:.0%} of {len(labels)} pictures, most of {len(known)} tried"
        )
        sources.pop("std", None)
    return replace(found, section=section, sources=sources, notes=(*found.notes, *_doubts(section, accuracy, root)))


def tempered(found: Found) -> Found:
    """``found`` with a temperature where the teacher is sure of what it sees in noise.

    Raises:
        RecipeError: its weights do not fit it.
    """
    spec = TeacherSpec.model_validate_json(json.dumps(found.section))
    temperature = temperature_for(_teacher(spec), spec)
    if temperature == 1:
        return found
    source = "divides its logits, because it is sure of all that it sees, noise included"
    return replace(
        found,
        section={**found.section, "temperature": temperature},
        sources={**found.sources, "temperature": source},
    )


def _doubts(section: Mapping[str, Any], accuracy: float, root: str) -> Iterator[str]:
    chance = 1 / section["classes"]
    if accuracy < chance + 0.25 * (1 - chance):
        yield (
            f"the teacher knows only {accuracy:.0%} of the pictures in {root!r} (chance is {chance:.0%}); check its "
            "weights, --size, --mean and --std, and which folder is which class"
        )


def _common_size(root: Path) -> int | list[int] | None:
    """The size that all pictures have; None where they differ."""
    shapes = set()
    for path in itertools.islice(pictures_in(root), PICTURES):
        with contextlib.suppress(OSError), Image.open(path) as picture:
            shapes.add((picture.height, picture.width))
    if len(shapes) != 1:
        return None
    height, width = shapes.pop()
    return height if height == width else [height, width]


def _pictures(section: Mapping[str, Any], space: ImageSpace, root: str) -> tuple[Tensor, Tensor]:
    """Up to 200 images uint8 [N, C, H, W] of all classes alike, and their labels."""
    spec, names = PluginSpec(kind="image_folder", root=root), section.get("class_names")
    data = open_real_data(spec, space, section["classes"], None if names is None else tuple(names))
    whole = in_memory(data.load("test"))
    chosen = torch.randperm(len(whole.labels), generator=rng_from(0))[:PICTURES]
    return whole.images[chosen], whole.labels[chosen]


def _moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, rounded, in [0, 1]."""
    pixels = images.float() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3)).clamp(0.01, 1)
    return tuple(round(value, 4) for value in mean.tolist()), tuple(round(value, 4) for value in std.tolist())


def _teacher(spec: TeacherSpec) -> nn.Module:
    network = build_network(spec, spec, where="teacher", seed=0)
    load_weights(network, spec.weights, where="teacher.weights")
    return network.eval()


@torch.no_grad()
def _accuracy(network: nn.Module, space: ImageSpace, images: Tensor, labels: Tensor) -> float:
    pixels = PixelRange(space)
    answers = torch.cat([network(pixels.from_uint8(batch)).argmax(1) for batch in images.split(50)])
    return float((answers == labels).float().mean())
