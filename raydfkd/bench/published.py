"""DeepInversion loops to measure against: as the field publishes it, and as a careful reader would write it.

They are used for comparison only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
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
        var, mean = self._moments(inputs[0])
        running_mean, running_var = self._layer.running_mean, self._layer.running_var
        assert running_mean is not None
        assert running_var is not None
        self.distance = (running_var.detach() - var).norm(2) + (running_mean.detach() - mean).norm(2)

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class _PublishedHook(_MomentHook):
    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.mean([0, 2, 3])
        return x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False), mean


class _FairHook(_MomentHook):
    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.var_mean(x.float(), (0, 2, 3), correction=0)


def published_loop(teacher: nn.Module, images: Tensor, targets: Tensor, *, lr: float) -> Callable[[], float]:
    """A function that makes one step on its own copy of ``images`` [N, C, H, W] and returns the loss.

    Faithful to what costs time in the released scripts (reference: Yin et al. 2020): the teacher's weights take part
    in the backward pass, forward hooks copy every BatchNorm input into channel-major order to take its variance,
    variation is one norm over the batch, and the loss is read from the device at every step.
    """
    network = copy.deepcopy(teacher).eval()
    hooks = [_PublishedHook(layer) for layer in _batchnorm_layers(network)]
    optimize = _optimizer(images, lr)

    def judge(view: Tensor) -> Tensor:
        network.zero_grad()
        return _objective(network(view), view, targets, hooks)

    return lambda: float(optimize(judge).item())


def fair_loop(
    teacher: nn.Module, images: Tensor, targets: Tensor, *, lr: float, precision: torch.dtype
) -> Callable[[], Tensor]:
    """The same without the costs that are free to avoid; the loss stays on the device.

    The teacher is frozen, convolutions are autocast to ``precision`` and moments come from one ``var_mean`` in a hook.
    The loop is eager and in the library's default memory format.
    """
    network = copy.deepcopy(teacher).eval().requires_grad_(False)
    hooks = [_FairHook(layer) for layer in _batchnorm_layers(network)]
    optimize = _optimizer(images, lr)

    def judge(view: Tensor) -> Tensor:
        with torch.autocast(view.device.type, precision, precision != torch.float32):
            logits = network(view)
        return _objective(logits.float(), view, targets, hooks)

    return lambda: optimize(judge)


def _batchnorm_layers(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]


def _optimizer(images: Tensor, lr: float) -> Callable[[Callable[[Tensor], Tensor]], Tensor]:
    pixels = images.clone().requires_grad_()
    adam = torch.optim.Adam([pixels], lr=lr, betas=(0.5, 0.9))

    def step(judge: Callable[[Tensor], Tensor]) -> Tensor:
        down, right = torch.randint(-2, 3, (2,)).tolist()
        adam.zero_grad()
        loss = judge(torch.roll(pixels, (down, right), (2, 3)))
        loss.backward()
        adam.step()
        with torch.no_grad():
            pixels.clamp_(-3, 3)
        return loss.detach()

    return step


def _objective(logits: Tensor, view: Tensor, targets: Tensor, hooks: Sequence[_MomentHook]) -> Tensor:
    variation = (
        (view[..., :, :-1] - view[..., :, 1:]).norm()
        + (view[..., :-1, :] - view[..., 1:, :]).norm()
        + (view[..., 1:, :-1] - view[..., :-1, 1:]).norm()
        + (view[..., :-1, :-1] - view[..., 1:, 1:]).norm()
    )
    moments = sum((hook.distance for hook in hooks), start=torch.zeros((), device=view.device))
    sizes = view.flatten(1).norm(dim=1).mean()
    objective: Tensor = F.cross_entropy(logits, targets) + 1e-4 * variation + moments + 1e-5 * sizes
    return objective
