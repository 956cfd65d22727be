"""Logits in few bytes: the largest ones, and the level of all others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_FINITE = torch.finfo(torch.half).max


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of logits [..., K], and one that stands for each of the K - k others.

    The latter is the mean of the others in probability, so that a softmax gives each of the largest the share that it
    had, and the rest to the others evenly. In float16; what that cannot hold becomes the nearest that it can.

    Returns:
        The largest with the others' level behind them, [..., k + 1], float16, and their classes, [..., k], int16 or,
        where K is more than 32,768, int32.
    """
    num_classes = logits.shape[-1]
    assert 0 < k < num_classes, f"{k} of {num_classes} logits leave none"
    values = logits.float()
    top, classes = values.topk(k, -1)
    others = values.scatter(-1, classes, -math.inf).logsumexp(-1, keepdim=True) - math.log(num_classes - k)
    kept = torch.cat([top, others], -1).clamp(-_FINITE, _FINITE).half()
    return kept, classes.to(class_dtype(num_classes))


def class_dtype(num_classes: int) -> torch.dtype:
    """Type of the numbers of so many classes, as ``largest`` returns them."""
    return torch.int16 if num_classes <= 2**15 else torch.int32


def completed(kept: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Logits [N, K], float16, of what ``largest`` kept of them: [N, k + 1] and [N, k]."""
    logits = kept[:, -1:].repeat(1, num_classes)
    return logits.scatter(1, classes.long(), kept[:, :-1])
