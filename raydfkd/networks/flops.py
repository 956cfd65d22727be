"""Arithmetic of a network and the numbers that it moves, counted without doing anything where that is possible."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from raydfkd.networks.answers import logits_of

Backward = Literal["image", "weights"]
"""That with respect to which a gradient is wanted: the image, the weights being frozen, or the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The work that an image is to a network."""

    flops: float
    """Additions and multiplications of convolutions, matrix products and attention."""
    elements: float
    """Numbers that these read and write beside weights, each once: the least that goes through a device's memory if
    everything between two of them is one kernel."""

    def __add__(self, other: Load) -> Load:
        return Load(flops=self.flops + other.flops, elements=self.elements + other.elements)

    def __mul__(self, times: float) -> Load:
        return Load(flops=times * self.flops, elements=times * self.elements)


NO_LOAD = Load(flops=0, elements=0)


def load_of(network: nn.Module, shape: tuple[int, ...], *, backward: Backward | None = None) -> Load:
    """The load of the answer to an image [C, H, W] or a vector, and of a gradient where one is wanted."""
    one, two = (_counted(network, (images, *shape), backward) for images in (1, 2))
    return Load(flops=one.flops, elements=two.elements - one.elements)  # where weights and their gradients drop out


def forward_flops(network: nn.Module, shape: tuple[int, ...]) -> float:
    """Of the answer to an image [C, H, W] or a vector: convolutions, matrix products and attention, as elsewhere."""
    return _counted(network, (1, *shape), None).flops


def image_gradient_flops(network: nn.Module, shape: tuple[int, ...]) -> float:
    """Of the answer to an image and of the gradient with respect to that image, the weights being frozen."""
    return _counted(network, (1, *shape), "image").flops


def training_flops(network: nn.Module, shape: tuple[int, ...]) -> float:
    """Of the answer to an image and of the gradient with respect to the weights."""
    return _counted(network, (1, *shape), "weights").flops


class _Traffic(TorchDispatchMode):
    """Adds up the numbers in what the operators whose arithmetic is counted read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as is much of torch
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.elements += sum(_stored(leaf) for leaf in tree_iter((args, out)) if isinstance(leaf, Tensor))
        return out


def _stored(tensor: Tensor) -> int:
    """Numbers of a tensor that lie in memory: those of weights that are expanded over the images lie there once."""
    return min(tensor.numel(), tensor.untyped_storage().nbytes() // tensor.itemsize)


def _convolution_backward(  # noqa: PLR0913, PLR0917 - those of the operator
    gy: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    wanted: Sequence[bool],
    **_: Any,
) -> int:
    """Arithmetic of a convolution's gradients: of its input and of its weights each as much as of its output.

    torch's own takes the weights of a depthwise convolution for those of a full one.
    """
    positions = math.prod((x if transposed else gy)[2:])
    return 2 * x[0] * positions * math.prod(weight) * sum(wanted[:2])


def _counted(network: nn.Module, shape: tuple[int, ...], backward: Backward | None) -> Load:
    try:
        return _counted_on("meta", network, shape, backward)
    except (RuntimeError, NotImplementedError, AssertionError):  # operators that need values, TorchScript
        return _counted_on("cpu", network, shape, backward)


def _counted_on(device: str, network: nn.Module, shape: tuple[int, ...], backward: Backward | None) -> Load:
    counted = copy.deepcopy(network).to(device).eval()
    for weight in counted.parameters():  # TorchScript modules have no requires_grad_, and copies that are no leaves
        weight.detach_().requires_grad_(backward == "weights")
    images = torch.zeros(shape, device=device, requires_grad=backward == "image")
    own = {torch.ops.aten.convolution_backward: _convolution_backward}
    with (
        FlopCounterMode(display=False, custom_mapping=own) as counter,
        _Traffic() as traffic,
        torch.set_grad_enabled(backward is not None),
    ):
        answer = logits_of(counted(images))
        if backward is not None:
            answer.backward(torch.ones_like(answer))  # a sum's gradient would be one number, expanded
    return Load(flops=int(counter.get_total_flops()), elements=traffic.elements)
