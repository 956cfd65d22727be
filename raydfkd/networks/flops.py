"""Additions and multiplications of a network, counted without doing them where that is possible."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from raydfkd.networks.answers import logits_of


def forward_flops(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Of the answer to an image [C, H, W] or a vector: convolutions, matrix products and attention, as elsewhere."""
    return _count(network, shape, backward=None)


def image_gradient_flops(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Of the answer to an image and of the gradient with respect to that image, the weights being frozen."""
    return _count(network, shape, backward="image")


def training_flops(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Of the answer to an image and of the gradient with respect to the weights."""
    return _count(network, shape, backward="weights")


def _count(network: nn.Module, shape: tuple[int, ...], *, backward: str | None) -> int:
    try:
        return _counted_on("meta", network, shape, backward)
    except (RuntimeError, NotImplementedError):  # operators that need values
        return _counted_on("cpu", network, shape, backward)


def _counted_on(device: str, network: nn.Module, shape: tuple[int, ...], backward: str | None) -> int:
    counted = copy.deepcopy(network).to(device).eval().requires_grad_(backward == "weights")
    image = torch.zeros(1, *shape, device=device, requires_grad=backward == "image")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward is not None):
        answer = logits_of(counted(image))
        if backward is not None:
            answer.sum().backward()
    return int(counter.get_total_flops())
