"""Judging a network."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from raydfkd.images.pixels import PixelRange
from raydfkd.networks.answers import logits_of


@torch.no_grad()
def predict(network: nn.Module, images: Tensor, pixels: PixelRange, *, batch_size: int = 500) -> Tensor:
    """Logits [N, K] of uint8 ``images``, in eval mode, on the device of the network's weights."""
    device = next(network.parameters()).device
    training = network.training
    network.eval()
    try:
        batches = (pixels.from_uint8(batch.to(device)) for batch in images.split(batch_size))
        return torch.cat([logits_of(network(batch)).cpu() for batch in batches])
    finally:
        network.train(training)


def judge(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Iterator[tuple[str, float]]:
    """Yield (name, fraction): agreement of the two logits [N, K], and top-1 of both where there are labels [N]."""
    yield "agreement", top1(student, teacher.argmax(1))
    if labels is not None:
        yield "teacher.top1", top1(teacher, labels)
        yield "student.top1", top1(student, labels)


def top1(logits: Tensor, labels: Tensor) -> float:
    """Share of ``logits`` [N, K] whose largest is that of the label [N]."""
    return (logits.argmax(1) == labels).float().mean().item()
