"""What makes a teacher hard to invert, as far as it shows before any work, and what helps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from raydfkd.config.schema import TeacherSpec
from raydfkd.networks.batchnorm import layers_with_statistics
from raydfkd.networks.observed import frozen_copy
from raydfkd.seeds import rng_from

TOO_SURE = 0.99
"""Confidence in noise from which a teacher is said to be sure of it; teachers of the zoo have 0.49 to 0.92."""
FEW_BATCHES = 20
"""Of fewer batches what a fresh layer begins with still weighs an eighth, with the usual momentum of 0.1."""
CALM = 0.75
"""Confidence in noise to which it is brought; the middle of the zoo's."""
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


def _sure_of_noise(teacher: nn.Module, spec: TeacherSpec) -> Iterator[str]:
    logits = _answers_to_noise(teacher, spec)
    confidence = _confidence(logits)
    if confidence > TOO_SURE:
        temperature = spec.temperature * _calming_temperature(logits)
        yield (
            f"the teacher is {confidence:.1%} sure of what it sees in noise: students of two that were made so lost 4 "
            "and 6 points, and had them back with a temperature (benchmarks.md); set "
            f"teacher.temperature: {temperature:.2g}, as `raydfkd init` does"
        )


def temperature_for(teacher: nn.Module, spec: TeacherSpec) -> float:
    """What a teacher's logits should be divided by: 1, unless it is too sure of noise. Two digits."""
    logits = _answers_to_noise(teacher, spec)
    return float(f"{_calming_temperature(logits):.2g}") if _confidence(logits) > TOO_SURE else 1.0


def _calming_temperature(logits: Tensor) -> float:
    """Which temperature makes the confidence in ``logits`` [N, K] as :data:`CALM` says, as far as any does."""
    low, high = 0.0, 40.0  # powers of two
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if _confidence(logits / 2**middle) > CALM else (low, middle)
    return float(2**high)


@torch.no_grad()
def _answers_to_noise(teacher: nn.Module, spec: TeacherSpec) -> Tensor:
    """Logits [N, K] of normalised images of noise.

    BatchNorm normalises by the moments of the noise itself: with those of the training, which noise is far from, logits
    are many times larger than real images have them.
    """
    network = frozen_copy(teacher)
    for _, layer in layers_with_statistics(network):
        layer.train()
    images = torch.randn(NOISE_IMAGES, *spec.image_space.shape, generator=rng_from(0))
    logits: Tensor = network(images)
    return logits.float()


def _confidence(logits: Tensor) -> float:
    """The median probability of the likeliest class; in the mean a few close calls would hide that logits are large."""
    return logits.softmax(1).amax(1).median().item()
