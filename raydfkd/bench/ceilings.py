"""Limits of the hardware: arithmetic and memory traffic of a step, and the machine's own rates for both."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raydfkd.networks.flops import image_gradient_flops

PASSES = 9
"""Times that a step must move each BatchNorm input through memory where everything between two convolutions is one
kernel. Forward, 4: written by the convolution before, read for moments and normalisation, the result written, and read
by the convolution after. Backward, 5: the gradient written by the convolution after, read beside the input, the
result written, and read by the convolution before. Shortcuts, pooling, weights and pixels are left out."""
_PATIENCE_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The least work of one step."""

    flops: float
    """Additions and multiplications of the forward pass and of the images' gradient."""
    bytes: float
    """Memory traffic, by the model above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Rates that a device reaches when it does nothing else."""

    flops_per_s: float
    """Rate of a matrix product."""
    bytes_per_s: float
    """Rate of a copy, reading and writing added up."""

    def least_seconds(self, cost: Cost) -> float:
        """The time that the binding ceiling would need for ``cost``."""
        return max(cost.flops / self.flops_per_s, cost.bytes / self.bytes_per_s)


def cost_of_step(teacher: nn.Module, images: Tensor, *, precision: torch.dtype) -> Cost:
    """Count the work on ``images`` [N, C, H, W] without doing it; weights are frozen."""
    network = copy.deepcopy(teacher).to("meta").eval().requires_grad_(False)
    activations = 0

    def add_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal activations
        activations += inputs[0].numel()

    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(add_input)
    with torch.no_grad():
        network(images.to("meta"))
    channels, height, width = images.shape[1:]
    flops = len(images) * image_gradient_flops(teacher, (channels, height, width))
    return Cost(flops=flops, bytes=PASSES * precision.itemsize * activations)


def measure_ceilings(device: torch.device, precision: torch.dtype) -> Ceilings:
    """Measure both rates, the best of several tries each, in about a second together."""
    source = torch.zeros(1 << 30 if device.type == "cuda" else 1 << 27, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return Ceilings(
        flops_per_s=_matrix_rate(device, precision),
        bytes_per_s=2 * source.numel() / _best_seconds(lambda: target.copy_(source), device),
    )


def _matrix_rate(device: torch.device, precision: torch.dtype) -> float:
    edge = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(edge, edge, device=device).to(precision)
    product = torch.empty_like(matrix)
    return 2 * edge**3 / _best_seconds(lambda: torch.mm(matrix, matrix, out=product), device)


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done everything that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    work()
    synchronize(device)
    best, until = float("inf"), time.perf_counter() + _PATIENCE_S
    while time.perf_counter() < until:
        started = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
