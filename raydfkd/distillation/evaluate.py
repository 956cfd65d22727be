"""Judging a network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from raydfkd.config.schema import ImageSpace
from raydfkd.distillation.metrics import Comparison
from raydfkd.images.pixels import PixelRange
from raydfkd.networks.answers import logits_of

BATCH, BATCH_BYTES = 500, 64 << 20
"""Maximum of the images that a network is asked about at once, and of their bytes as float32."""


def batch_size(space: ImageSpace) -> int:
    """How many images of a space to judge at once."""
    channels, height, width = space.shape
    return max(1, min(BATCH, BATCH_BYTES // (4 * channels * height * width)))


@torch.no_grad()
def judge(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    pixels: PixelRange,
    *,
    classes: int,
) -> Comparison:
    """Ask both networks, in eval mode on the device of their weights, about each batch of a single pass.

    Args:
        student: answers logits [N, K].
        teacher: as well.
        batches: uint8 images [N, C, H, W], and labels [N] or None.
        pixels: from those to what the networks see.
        classes: K.
    """
    comparison = Comparison(classes)
    device = next(teacher.parameters()).device
    with ExitStack() as stack:
        for network in (student, teacher):
            stack.enter_context(in_eval_mode(network))
        for images, labels in batches:
            seen = pixels.from_uint8(images.to(device))
            comparison.add(logits_of(student(seen)).cpu(), logits_of(teacher(seen)).cpu(), labels)
    return comparison


@contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Have the network in eval mode for a while, and then as it was."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def top1(logits: Tensor, labels: Tensor) -> float:
    """Share of ``logits`` [N, K] whose largest is that of the label [N]."""
    return (logits.argmax(1) == labels).float().mean().item()
