"""Evidence of how well a student knows its teacher that no real image is needed for: agreement on images of many kinds.

None of the images is the student's own. What they are follows from the teacher and a seed alone, so that students of
different methods are compared on the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from raydfkd.config.load import page_data
from raydfkd.config.recipe import Recipe
from raydfkd.distillation.evaluate import batch_size, in_eval_mode
from raydfkd.images.augment import Affine
from raydfkd.images.pixels import PixelRange, nominal_from_uint8, nominal_to_uint8
from raydfkd.networks.answers import logits_of
from raydfkd.networks.batchnorm import layers_with_statistics
from raydfkd.runner.probe import drawn_probe
from raydfkd.runner.suits import with_synthesis
from raydfkd.seeds import derive_seed, rng_from
from raydfkd.synthesis.build import build_synthesizer
from raydfkd.units import Request

IMAGES = 200
"""Images of a kind that is optimised, about."""
BATCH = 100
"""Images that are optimised at a time; of more classes than these some are left out."""
PIXEL_STEPS, GENERATOR_STEPS, RENEWAL_STEPS = 50, 60, 20
MOVES = Affine(degrees=15, scale=0.2, shift=0.15)
"""Moves an image as far as it may come in a picture, and no further."""


def evidence(recipe: Recipe, teacher: nn.Module, student: nn.Module) -> dict[str, float]:
    """Agreement of student and teacher on images of several kinds, each as it is and ``moved``, and the teacher's own.

    Kinds are images that are drawn, whose pixels are optimised, that a generator makes, and ``mixed`` halves of the
    first and the last. ``steady_...`` is how often the teacher gives an image and its moved copy the same class,
    ``sure_...`` its mean confidence.

    Args:
        recipe: whose image space, classes and seed count.
        teacher: on the device on which both are asked.
        student: on the same one.
    """
    found = {}
    for kind, images in _kinds(recipe, teacher):
        moved = _moved(images, recipe, kind)
        answers, moved_answers = (_answers(recipe, teacher, shown) for shown in (images, moved))
        found[kind] = _share_alike(answers, _answers(recipe, student, images))
        found[f"{kind}_moved"] = _share_alike(moved_answers, _answers(recipe, student, moved))
        found[f"steady_{kind}"] = _share_alike(answers, moved_answers)
        found[f"sure_{kind}"] = answers.softmax(1).amax(1).mean().item()
    return {name: round(value, 4) for name, value in found.items()}


def _kinds(recipe: Recipe, teacher: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names of kinds and their images, uint8 [n, C, H, W]."""
    drawn = drawn_probe(teacher, recipe.teacher.image_space, seed=recipe.seed)
    yield "drawn", drawn
    yield "pixels", _optimised(recipe, teacher, _pixels(teacher))
    generated = _optimised(recipe, teacher, _generator(teacher))
    yield "generated", generated
    count = min(len(drawn), len(generated))
    order = torch.randperm(len(drawn), generator=rng_from(derive_seed(recipe.seed, "mixed evidence")))[:count]
    yield "mixed", ((drawn[order].int() + generated[:count].int()) // 2).to(torch.uint8)


def _pixels(teacher: nn.Module) -> dict[str, Any]:
    name = "deepinversion" if layers_with_statistics(teacher) else "deepdream"
    return {**page_data(name)["synthesis"], "stages": [{"steps": PIXEL_STEPS}], "batch_size": BATCH}


def _generator(teacher: nn.Module) -> dict[str, Any]:
    name = "renewed_generator" if layers_with_statistics(teacher) else "renewed_generator_logits"
    synthesis = dict(page_data(name)["synthesis"])
    return {
        **synthesis,
        "steps": GENERATOR_STEPS,
        "renewal": {**synthesis["renewal"], "steps": RENEWAL_STEPS},
    }


def _optimised(recipe: Recipe, teacher: nn.Module, synthesis: dict[str, Any]) -> Tensor:
    seed = derive_seed(recipe.seed, "evidence")
    order = torch.randperm(recipe.teacher.classes, generator=rng_from(seed))[:BATCH]
    classes = tuple(sorted(order.tolist()))
    each = max(1, BATCH // len(classes))
    if "batch_size" not in synthesis:
        synthesis["batch_per_class"] = each
    device = next(teacher.parameters()).device
    synthesizer = build_synthesizer(with_synthesis(recipe, synthesis), teacher, device)
    request = Request(
        classes=classes,
        images_per_class=each * max(1, IMAGES // (each * len(classes))),
        seed=seed,
        class_seeds=[derive_seed(seed, label) for label in classes],
    )
    return torch.cat([batch.images.cpu() for batch in synthesizer.produce(request, lambda _: None)])


def _moved(images: Tensor, recipe: Recipe, kind: str) -> Tensor:
    rng = rng_from(derive_seed(recipe.seed, f"{kind} moved"))
    return torch.cat(
        [
            nominal_to_uint8(MOVES(nominal_from_uint8(batch), rng))
            for batch in images.split(batch_size(recipe.teacher.image_space))
        ]
    )


def _share_alike(logits: Tensor, others: Tensor) -> float:
    """Share of images to which both [n, K] give the same class."""
    return (logits.argmax(1) == others.argmax(1)).float().mean().item()


@torch.no_grad()
def _answers(recipe: Recipe, network: nn.Module, images: Tensor) -> Tensor:
    """Logits [n, K] of ``network``, on the CPU."""
    space, device = recipe.teacher.image_space, next(network.parameters()).device
    pixels = PixelRange(space, device)
    batches = images.split(batch_size(space))
    with in_eval_mode(network):
        return torch.cat([logits_of(network(pixels.from_uint8(batch.to(device)))).cpu().float() for batch in batches])
