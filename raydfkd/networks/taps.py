"""Where in a network that is found which is to be read of its inside."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from raydfkd.errors import RecipeError
from raydfkd.networks.answers import logits_of

FIRST_CONVOLUTION = "first_convolution"
"""Stands for the path of a network's first convolution, the one that was registered first."""


def wrapped(network: nn.Module) -> nn.Module:
    """The network that a wrapper for data parallelism holds; itself where there is none."""
    if not isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return network
    inner: nn.Module = network.module
    return wrapped(inner)


def layer_at(network: nn.Module, path: str, *, name: str, who: str) -> nn.Module:
    """The layer of ``network`` at ``path``, or its first convolution.

    Raises:
        RecipeError: there is none; it says which have a similar path.
    """
    layers: dict[str, nn.Module] = dict(wrapped(network).named_modules())
    if path == FIRST_CONVOLUTION and path not in layers:
        first = next((layer for layer in layers.values() if isinstance(layer, _ConvNd)), None)
        if first is None:
            raise RecipeError(f"{who} names the first convolution, but the {name} has none; name a layer by its path")
        return first
    if path not in layers or not path:
        close = difflib.get_close_matches(path, [known for known in layers if known], n=3, cutoff=0.3)
        remedy = f"the nearest are {', '.join(close)}" if close else f"its first are {', '.join([*layers][1:4])}"
        raise RecipeError(f"{who} names the layer {path!r}, which the {name} has not; {remedy}")
    return layers[path]


def tap_output(layer: nn.Module, path: str, into: dict[str, Tensor], *, who: str) -> None:
    """Keep the output of ``layer``'s last call as ``into[path]``."""

    def keep(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor):
            raise RecipeError(f"{who} names the layer {path!r}, which answers a {type(output).__name__}, not a tensor")
        into[path] = output.clone()  # a ReLU behind it may work in place

    layer.register_forward_hook(keep)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The linear layer that makes a network's logits."""

    path: str
    call: int
    """Which of its calls makes them, counted from the last, which is -1."""


def find_head(network: nn.Module, images: Tensor) -> Head | None:
    """Run ``network``, in eval mode, on ``images`` and find the linear layer whose output its logits are.

    Logits up to a constant an image count, so that a log-softmax behind the layer does no harm. A convolution with 1x1
    weights over a single position is a linear layer too.
    """
    outputs: dict[str, list[Tensor]] = {}

    def keeping(path: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _, inputs, output: outputs.setdefault(path, []).append(output.detach().clone())

    linear = [(path, layer) for path, layer in network.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    hooks = [layer.register_forward_hook(keeping(path)) for path, layer in linear]
    try:
        with torch.no_grad():
            logits = logits_of(network(images))
    finally:
        for hook in hooks:
            hook.remove()
    shares = logits.float().log_softmax(1)
    for path, calls in reversed(outputs.items()):
        for call, output in enumerate(reversed(calls), start=1):
            is_alike = output.numel() == logits.numel() and len(output) == len(logits)
            if is_alike and torch.allclose(output.flatten(1).float().log_softmax(1), shares, rtol=1e-3, atol=1e-4):
                return Head(path=path, call=-call)
    return None


def tap_input(layer: nn.Module, into: list[Tensor]) -> None:
    """Add the input of every call of ``layer`` to ``into``."""

    def keep(_: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        into.append(inputs[0] if inputs else named["input"])

    layer.register_forward_pre_hook(keep, with_kwargs=True)
