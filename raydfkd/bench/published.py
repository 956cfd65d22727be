"""The DeepInversion loop as the field publishes it, to measure against. Not used for anything else.

Faithful to what costs time in the released scripts (reference: Yin et al. 2020): the teacher's weights take part in
the backward pass, forward hooks copy every BatchNorm input into channel-major order to take its variance, variation
is one norm over the batch, and the loss is read from the device at every step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _MomentHook:
    def __init__(self, layer: nn.BatchNorm2d) -> None:
        self._layer = layer
        self.distance = torch.zeros(())
        layer.register_forward_hook(self._measure)

    def _measure(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        x = inputs[0]
        mean = x.mean([0, 2, 3])
        var = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)
        running_mean, running_var = self._layer.running_mean, self._layer.running_var
        assert running_mean is not None
        assert running_var is not None
        self.distance = (running_var.detach() - var).norm(2) + (running_mean.detach() - mean).norm(2)


def published_loop(teacher: nn.Module, images: Tensor, targets: Tensor, *, lr: float) -> Callable[[], float]:
    """A function that makes one step on its own copy of ``images`` [N, C, H, W] and returns the loss."""
    network = copy.deepcopy(teacher).eval()
    hooks = [_MomentHook(layer) for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    pixels = images.clone().requires_grad_()
    optimizer = torch.optim.Adam([pixels], lr=lr, betas=(0.5, 0.9))

    def step() -> float:
        down, right = torch.randint(-2, 3, (2,)).tolist()
        view = torch.roll(pixels, (down, right), (2, 3))
        optimizer.zero_grad()
        network.zero_grad()
        cross_entropy = F.cross_entropy(network(view), targets)
        variation = (
            (view[..., :, :-1] - view[..., :, 1:]).norm()
            + (view[..., :-1, :] - view[..., 1:, :]).norm()
            + (view[..., 1:, :-1] - view[..., :-1, 1:]).norm()
            + (view[..., :-1, :-1] - view[..., 1:, 1:]).norm()
        )
        moments = sum((hook.distance for hook in hooks), start=torch.zeros((), device=images.device))
        loss = cross_entropy + 1e-4 * variation + moments + 1e-5 * view.flatten(1).norm(dim=1).mean()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            pixels.clamp_(-3, 3)
        return float(loss.item())

    return step
