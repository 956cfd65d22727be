"""The average of a network's weights over the steps of its training."""

from __future__ import annotations

import copy

import torch
from torch import nn


class WeightAverage:
    """Exponential moving average of a network's weights and statistics (Polyak & Juditsky 1992, with decay).

    In step number n it keeps the share min(decay, (1 + n) / (10 + n)) of itself, so that the fresh weights, with which
    it begins, are forgotten in a short training too. Integers, such as BatchNorm's count of batches, are copied.

    Args:
        network: in training; it is copied with what hooks it has by now.
        decay: share of itself that it keeps in a step, in the long run.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network)
        """The average."""
        self._source = network
        self._decay = decay
        for weight in self.network.parameters():
            weight.requires_grad_(False)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step number ``step``, from 1."""
        keep = min(self._decay, (1 + step) / (10 + step))
        ours, theirs = ([*one.parameters(), *one.buffers()] for one in (self.network, self._source))
        for own, new in zip(ours, theirs, strict=True):
            if own.is_floating_point():
                own.lerp_(new, 1 - keep)
            else:
                own.copy_(new)
