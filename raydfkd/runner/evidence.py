"""Evidence of how well a student knows its teacher that no real image is needed for: agreement on images of two kinds.

One kind owes the teacher nothing, the other all: real images are somewhere between. None of them is the student's own.
What they are follows from the teacher and a seed alone, so that students of different methods are compared on the same
ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
from raydfkd.seeds import derive_seed, rng_from
from raydfkd.synthesis.build import build_synthesizer
from raydfkd.units import Request

KINDS = ("drawn", "generated")
SHARES = tuple(f"{kind}{how}" for kind in KINDS for how in ("", "_moved", "_firm"))
"""Names of the agreements."""
OF_TEACHER = tuple(f"{what}_{kind}" for what in ("steady", "sure") for kind in KINDS)
"""Names of what is found of the teacher alone."""
IMAGES = 200
"""Generated images, about."""
BATCH = 100
"""Images that are generated at a time; of more classes than these some are left out."""
GENERATOR_STEPS, RENEWAL_STEPS = 60, 20
MOVES = Affine(degrees=15, scale=0.2, shift=0.15)
"""Moves an image as far as it may come in a picture, and no further."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """Images of a kind, their moved copies, and the classes that the teacher gives both."""

    images: Tensor
    moved: Tensor
    classes: Tensor
    moved_classes: Tensor
    sure: float
    """The teacher's mean confidence in ``images``."""


class Evidence:
    """Images of both kinds with the teacher's answers to them, on which any number of students can be asked.

    Args:
        recipe: whose image space, classes and seed count.
        teacher: on the device on which networks are asked.
    """

    def __init__(self, recipe: Recipe, teacher: nn.Module) -> None:
        self._recipe = recipe
        self._shown: dict[str, _Shown] = {}
        for kind, images in _kinds(recipe, teacher):
            moved = _moved(images, recipe, kind)
            answers = _answers(recipe, teacher, images)
            self._shown[kind] = _Shown(
                images=images,
                moved=moved,
                classes=answers.argmax(1),
                moved_classes=_answers(recipe, teacher, moved).argmax(1),
                sure=answers.softmax(1).amax(1).mean().item(),
            )

    def of(self, student: nn.Module) -> dict[str, float]:
        """Agreement of a student with the teacher on both kinds, and how the teacher takes them; shares.

        Of each kind there is the agreement on the images, on ``..._moved`` copies, and on ``..._firm`` images, those
        whose moved copy the teacher gives the same class, as it does with most real ones; each is the mean over the
        classes that the teacher finds. ``steady_...`` is the share of firm images, ``sure_...`` the teacher's mean
        confidence.
        """
        found = {}
        for kind, shown in self._shown.items():
            alike = shown.classes == _answers(self._recipe, student, shown.images).argmax(1)
            alike_moved = shown.moved_classes == _answers(self._recipe, student, shown.moved).argmax(1)
            firm = shown.classes == shown.moved_classes
            found[kind] = _over_classes(alike, shown.classes)
            found[f"{kind}_moved"] = _over_classes(alike_moved, shown.moved_classes)
            found[f"{kind}_firm"] = _over_classes(alike[firm], shown.classes[firm]) if firm.any() else found[kind]
            found[f"steady_{kind}"] = firm.float().mean().item()
            found[f"sure_{kind}"] = shown.sure
        return {name: round(value, 4) for name, value in found.items()}


def _kinds(recipe: Recipe, teacher: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names of kinds and their images, uint8 [n, C, H, W]."""
    yield "drawn", drawn_probe(teacher, recipe.teacher.image_space, seed=recipe.seed)
    yield "generated", _generated(recipe, teacher)


def check_evidence(recipe: Recipe, teacher: nn.Module) -> None:
    """Put together once what makes the generated images, on the CPU.

    Raises:
        RecipeError: it does not suit the teacher.
    """
    build_synthesizer(_of_generator(recipe, teacher, 1), teacher, torch.device("cpu"), is_trial=True)


def _of_generator(recipe: Recipe, teacher: nn.Module, batch_per_class: int) -> Recipe:
    method = "renewed_generator" if layers_with_statistics(teacher) else "renewed_generator_logits"
    synthesis: dict[str, Any] = dict(page_data(method)["synthesis"])
    synthesis |= {
        "steps": GENERATOR_STEPS,
        "renewal": {**synthesis["renewal"], "steps": RENEWAL_STEPS},
        "batch_per_class": batch_per_class,
        "compile": False,  # takes longer than so few steps
    }
    return recipe.with_synthesis(synthesis)


def _generated(recipe: Recipe, teacher: nn.Module) -> Tensor:
    seed = derive_seed(recipe.seed, "evidence")
    order = torch.randperm(recipe.teacher.classes, generator=rng_from(seed))[:BATCH]
    classes = tuple(sorted(order.tolist()))
    each = max(1, BATCH // len(classes))
    device = next(teacher.parameters()).device
    synthesizer = build_synthesizer(_of_generator(recipe, teacher, each), teacher, device)
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


def _over_classes(alike: Tensor, classes: Tensor) -> float:
    """Mean over the ``classes`` that occur of the share of images that are ``alike``; both [n]."""
    return torch.stack([alike[classes == label].float().mean() for label in classes.unique()]).mean().item()


@torch.no_grad()
def _answers(recipe: Recipe, network: nn.Module, images: Tensor) -> Tensor:
    """Logits [n, K] of ``network``, on the CPU."""
    space, device = recipe.teacher.image_space, next(network.parameters()).device
    pixels = PixelRange(space, device)
    batches = images.split(batch_size(space))
    with in_eval_mode(network):
        return torch.cat([logits_of(network(pixels.from_uint8(batch.to(device)))).cpu().float() for batch in batches])
