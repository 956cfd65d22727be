"""BatchNorm statistics of a finished student: those of its last weights, not a memory of earlier ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def tracking_layers(network: nn.Module) -> list[_BatchNorm]:
    """BatchNorm layers whose running statistics follow the batches: in training mode, and with statistics at all."""
    return [
        layer
        for layer in network.modules()
        if isinstance(layer, _BatchNorm) and layer.training and layer.running_mean is not None
    ]


@torch.no_grad()
def reestimate(network: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replace the running statistics of ``network``, which is in training mode, by the mean over ``batches``.

    Running statistics are an average over the last 1 / momentum steps: 10 for torch's default, but 100 for
    torchvision's MobileNetV3, whose statistics after 300 steps still describe weights that are long gone. Here every
    batch counts equally (Wu & Johnson 2021, PreciseBN), and only BatchNorm is in training mode, since the finished
    student meets no dropout. Momentum and ``num_batches_tracked`` stay; layers in eval mode are left alone.

    Args:
        network: in training mode, on the device of the batches; in training mode again afterwards.
        batches: normalised images [N, C, H, W], as many each as a training step has.

    Returns:
        Batches that were used; with none, the statistics are as they were.
    """
    layers = tracking_layers(network)
    before = [(layer.momentum, _count(layer)) for layer in layers]
    used = 0
    try:
        for images in batches if layers else ():
            with _only_training(network, layers):
                if not used:
                    _restart(layers)
                network(images)
            used += 1
    finally:
        for layer, (momentum, tracked) in zip(layers, before, strict=True):
            layer.momentum = momentum
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.fill_(tracked)
    return used


@torch.no_grad()
def answers_in_both_modes(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, K] with the statistics of ``images`` themselves, as in training, and with the running ones.

    The network, which is in training mode, and its statistics are as before afterwards; dropout rests in both.
    """
    layers = tracking_layers(network)
    kept = [(layer.running_mean, layer.running_var, layer.num_batches_tracked) for layer in layers]
    with _only_training(network, layers):
        for layer in layers:
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        try:
            by_batch = network(images)
        finally:
            for layer, (mean, var, tracked) in zip(layers, kept, strict=True):
                layer.running_mean, layer.running_var, layer.num_batches_tracked = mean, var, tracked
        network.eval()
        return by_batch, network(images)


def _restart(layers: Iterable[_BatchNorm]) -> None:
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative average


def _count(layer: _BatchNorm) -> int:
    return 0 if layer.num_batches_tracked is None else int(layer.num_batches_tracked)


@contextlib.contextmanager
def _only_training(network: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Everything but ``layers`` in eval mode; every module in its own mode again afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
