"""What makes a teacher hard to invert, as far as it shows before any work, and what helps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from raydfkd.config.schema import TeacherSpec
from raydfkd.networks.batchnorm import layers_with_statistics
from raydfkd.networks.observed import frozen_copy
from raydfkd.seeds import rng_from

TOO_SURE = 0.98
"""Mean confidence in noise from which a teacher is said to be sure of it; teachers of the zoo have 0.57 to 0.95."""
FEW_BATCHES = 20
"""Of fewer batches what a fresh layer begins with still weighs an eighth, with the usual momentum of 0.1."""
NOISE_IMAGES = 16
"""Few, since every check asks the teacher about them, however large it is."""


def hardness(teacher: nn.Module, spec: TeacherSpec) -> list[str]:
    """What is known to make a teacher with its weights hard to invert, and what helps, a line each; often none.

    Leaves the network and all random numbers as they are.
    """
    return [*_no_statistics(teacher), *_few_batches(teacher), *_sure_of_noise(teacher, spec)]


def _no_statistics(teacher: nn.Module) -> Iterator[str]:
    if not layers_with_statistics(teacher):
        yield (
            "the teacher has no BatchNorm, whose statistics tell most of its images: students of three such teachers "
            "came to 0.88 of their accuracy, of four with BatchNorm to 0.95 (benchmarks.md); judge on real ones if you"
            " can; 100 unlabelled ones to start from (synthesis.start.images) gave 13 points on Fashion-MNIST"
        )


def _few_batches(teacher: nn.Module) -> Iterator[str]:
    counts = [_batches(layer) for _, layer in layers_with_statistics(teacher)]
    seen = min((count for count in counts if count), default=0)
    if 0 < seen < FEW_BATCHES:
        yield (
            f"the teacher's BatchNorm statistics are of {seen} batches, too few to be those of its images: let it see "
            "more in training mode, or take statistics of unlabelled pictures (synthesis.statistics)"
        )


def _batches(layer: nn.Module) -> int:
    """Batches that a layer's statistics are of; 0 where it does not say, or averages them in another way."""
    tracked = layer._buffers.get("num_batches_tracked")
    return 0 if tracked is None or not getattr(layer, "momentum", None) else int(tracked)


@torch.no_grad()
def _sure_of_noise(teacher: nn.Module, spec: TeacherSpec) -> Iterator[str]:
    images = torch.randn(NOISE_IMAGES, *spec.image_space.shape, generator=rng_from(0))
    logits: Tensor = frozen_copy(teacher)(images)
    confidence = logits.softmax(1).amax(1).mean().item()
    if confidence > TOO_SURE:
        yield (
            f"the teacher is {confidence:.1%} sure of what it sees in noise, so its answers to images unlike its own"
            " tell little; an earlier checkpoint may tell more"
        )
