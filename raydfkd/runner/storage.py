"""Bytes that a recipe's set takes on the store, and what the teacher's answers to the student's images take."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from raydfkd.config.recipe import Recipe
from raydfkd.data.commits import BYTES_BESIDE
from raydfkd.data.encodings import Encoding, encode_images
from raydfkd.data.view_source import VIEWS, bytes_held
from raydfkd.images.procedural import MODELS, draw, plain_grounds
from raydfkd.seeds import rng_from

DRAWN = 64
"""Drawn images that the size of encoded ones is estimated by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """The teacher's answers to the student's images, by the three ways to come by them."""

    asked: int
    """Images that the teacher is asked about in the way that the recipe takes."""
    live_pflop: float
    """Asked in each step, about images of any augmentation."""
    stored_bytes: int
    """In the set, about the images as they are; synthesis has them anyway."""
    views: int
    """Augmented views of each image that source `views` asks about once; its default where the recipe has another."""
    views_pflop: float
    views_bytes: int
    """Of memory, over all training workers together; nothing of it is on the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """What a set takes on the store, in the recipe's encoding and form of logits."""

    bytes: int
    pixel_bytes: float
    """Of an image, part of those."""
    based_on: str
    """What ``pixel_bytes`` rests on."""


def storage_of(recipe: Recipe, images: int) -> Storage:
    """What ``images`` take; files of an encoding are as large as those of drawn images of the recipe's size.

    Measured on grey images of 32 pixels (benchmarks.md), those are right to 3 % for JPEG and lossy WebP of what
    generators make and a quarter too small for the lossless forms; for optimised pixels, which are rougher, 10 to 50 %.
    """
    spec = recipe.transfer_set
    encoding = Encoding(kind=spec.encoding.kind, quality=spec.encoding.quality)
    pixels, based_on = float(math.prod(recipe.made_space.shape)), "pixels as they are"
    if encoding.kind != "raw":
        pixels, based_on = _bytes_of_drawn(recipe, encoding), f"{DRAWN} drawn images of that size"
    row = pixels + spec.logits.bytes_of(recipe.teacher.classes) + BYTES_BESIDE
    return Storage(bytes=round(images * row), pixel_bytes=pixels, based_on=based_on)


def _bytes_of_drawn(recipe: Recipe, encoding: Encoding) -> float:
    space = recipe.made_space
    drawn = draw(tuple(MODELS), DRAWN, space, rng_from(0), plain=plain_grounds(space))
    return sum(map(len, encode_images((255 * drawn).round().to(torch.uint8), encoding))) / DRAWN


def answers_of(recipe: Recipe, images: int, forward_flops: float) -> Answers:
    """What the answers take, where one costs the teacher ``forward_flops``."""
    distill, classes = recipe.distill, recipe.teacher.classes
    options = {key: value for key, value in distill.source.options.items() if key in ("views", "keep", "top_k")}
    if distill.source.kind != "views":
        options = {"keep": "all"} if classes <= 10 else {}
    views = int(options.get("views", VIEWS))
    live = distill.steps * distill.batch_size
    asked = live if distill.teacher_logits == "live" else 0
    return Answers(
        asked=images * views if distill.source.kind == "views" else asked,
        live_pflop=live * forward_flops / 1e15,
        stored_bytes=images * recipe.transfer_set.logits.bytes_of(classes),
        views=views,
        views_pflop=images * views * forward_flops / 1e15,
        views_bytes=bytes_held(images, classes, **options),
    )
