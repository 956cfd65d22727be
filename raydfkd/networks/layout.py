"""How a network's weights lie in memory."""

from __future__ import annotations

import itertools

import torch
from torch import nn


def lay_channels_last(network: nn.Module) -> nn.Module:
    """Lay weights of 2-D convolutions out as their fast kernels have them, in place; those of other ranks stay."""
    for weight in itertools.chain(network.parameters(), network.buffers()):
        if weight.ndim == 4:
            weight.data = weight.data.to(memory_format=torch.channels_last)
    return network
