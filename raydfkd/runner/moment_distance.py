"""How far the BatchNorm moments of images lie from those that the teacher stored in training: of noise, made and real.

The teacher alone says it, of images of any kind, whatever objective made them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from raydfkd.config.recipe import Recipe
from raydfkd.devices import pick_device
from raydfkd.errors import RecipeError
from raydfkd.images.pixels import PixelRange
from raydfkd.losses.moments import BatchNormMoments
from raydfkd.losses.objective import View
from raydfkd.networks.batchnorm import layers_with_statistics
from raydfkd.networks.measured import joined_moments
from raydfkd.networks.observed import Need, ObservedNetwork
from raydfkd.networks.teacher import Teacher
from raydfkd.report.page import evenly_spaced
from raydfkd.seeds import derive_seed, rng_from

IMAGES = 200
"""Images of a kind whose moments are taken together."""
BATCH = 32


def moment_distances(
    recipe: Recipe, teacher: Teacher, synthetic: Tensor, real: Tensor | None
) -> dict[str, float | None] | None:
    """The distance of ``IMAGES`` images of a kind, as report.json has it, in nats; None where nothing can be compared.

    That is so for a teacher without BatchNorm statistics, or with layers that normalise in a way of their own.

    Args:
        recipe: of the images.
        teacher: asked on the device of the process that drives a run.
        synthetic: uint8 [N, C, H, W], as they are stored.
        real: photographs, uint8 [M, C, H, W] of the teacher's size; None where there are none.
    """
    if not layers_with_statistics(teacher.module):
        return None
    space, device = recipe.teacher.image_space, pick_device(recipe.runtime.driver_device)
    try:
        network = ObservedNetwork(teacher.module, taps={Need.MOMENTS}, frozen=True, image_shape=space.shape).to(device)
    except RecipeError:
        return None
    made, whole = PixelRange(space, device, made=recipe.made_space), PixelRange(space, device)

    def of(batches: Iterable[Tensor], seen: Callable[[Tensor], Tensor]) -> float:
        return moment_distance(network, (seen(batch.to(device)) for batch in batches))

    return {
        "noise": of(_noise(recipe), made.from_nominal),
        "synthetic": of(_spread(synthetic), made.from_uint8),
        "real": None if real is None else of(_spread(real), whole.from_uint8),
    }


def _noise(recipe: Recipe) -> Iterator[Tensor]:
    """What the optimisation of pixels starts from, in nominal units."""
    rng = rng_from(derive_seed(recipe.seed, "noise beside images"))
    for first in range(0, IMAGES, BATCH):
        yield torch.randn(min(BATCH, IMAGES - first), *recipe.made_space.shape, generator=rng)


def _spread(images: Tensor) -> tuple[Tensor, ...]:
    """Batches of images that are evenly spaced over those that there are."""
    batches: tuple[Tensor, ...] = images[evenly_spaced(len(images), IMAGES)].split(BATCH)
    return batches


@torch.no_grad()
def moment_distance(network: ObservedNetwork, batches: Iterable[Tensor]) -> float:
    """The term ``bn_moments`` in its kl form, in nats, of all images in ``batches`` together.

    Args:
        network: whose moments are read.
        batches: [N, C, H, W] each, in its units; one of them at least.
    """
    batch, seen, noted = None, None, []
    for batch in batches:
        seen = network(batch)
        noted.append((len(batch), seen.moments))
    assert batch is not None, "there are images"
    assert seen is not None, "there are images"
    moments = tuple(
        replace(one, running_mean=stored.running_mean, running_var=stored.running_var)
        for one, stored in zip(joined_moments(noted), seen.moments, strict=True)
    )
    view = View(images=batch, targets=None, teacher=replace(seen, moments=moments), observe=network)
    return float(BatchNormMoments(form="kl")(view))
