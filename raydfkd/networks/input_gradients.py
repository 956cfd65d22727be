"""Input gradients of frozen convolutions, where the library's own are many times slower than their arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

STEM_CHANNELS = 4
"""Input channels up to which a convolution counts as a network's first."""


class Convolution(NamedTuple):
    """A 2-D convolution by weights that take no gradient; a tuple, which compilers can look into."""

    weight: Tensor
    """[O, I / groups, kh, kw]."""
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def __call__(self, x: Tensor) -> Tensor:
        """Maps [N, I, H, W] to maps [N, O, h, w]."""
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def to(self, dtype: torch.dtype) -> Convolution:
        """The same with weights of ``dtype``."""
        return self._replace(weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype))


InputGradient = Callable[[Convolution, Tensor, tuple[int, int]], Tensor]
"""Gradient [N, I, H, W] of a convolution's input of size (H, W), from that of its output [N, O, h, w]."""


def by_columns(convolution: Convolution, gy: Tensor, size: tuple[int, int]) -> Tensor:
    """A matrix product and a scatter-add of its columns: for stems in float32.

    With one to four input channels oneDNN's own takes up to five times as long.
    """
    columns = convolution.weight.flatten(1).t() @ gy.flatten(2)
    kernel = convolution.weight.shape[2:]
    return F.fold(columns, size, kernel, convolution.dilation, convolution.padding, convolution.stride)


def by_subpixels(convolution: Convolution, gy: Tensor, size: tuple[int, int]) -> Tensor:
    """A convolution without stride that makes every pixel between two strides as a channel of its own: for stems.

    Accumulates in float32 as oneDNN does, in half its time for 7x7 weights of stride 2 in bfloat16.
    """
    stride, kernel = convolution.stride[0], convolution.weight.shape[2:]
    weight, margins = convolution.weight, []
    for axis in (1, 0):
        # Input pixel stride * a + r met weight r + padding + stride * m in output a - m, for m from first to last.
        padding, taps = convolution.padding[axis], kernel[axis]
        first, last = -((stride - 1 + padding) // stride), (taps - 1 - padding) // stride
        around = (-padding - stride * first, stride * (last + 1) + padding - taps)
        weight = F.pad(weight.movedim(2 + axis, -1), around).movedim(-1, 2 + axis)
        weight = weight.unflatten(2 + axis, (last - first + 1, stride))
        cells = -(-size[axis] // stride)
        margins += [last, cells - first - gy.shape[2 + axis]]
    weight = weight.permute(1, 3, 5, 0, 2, 4).flatten(0, 2).flip(2, 3)
    pixels = F.pixel_shuffle(F.conv2d(F.pad(gy, margins), weight), stride)
    return pixels[..., : size[0], : size[1]]


def by_spreading(convolution: Convolution, gy: Tensor, size: tuple[int, int]) -> Tensor:
    """The gradient spread out by the stride, then convolved with the mirrored weights: for depthwise convolutions.

    In bfloat16 oneDNN has no kernel of its own for these and takes twenty times as long.
    """
    weight, stride = convolution.weight, convolution.stride
    reach = [dilation * (taps - 1) for dilation, taps in zip(convolution.dilation, weight.shape[2:], strict=True)]
    padding = [extent - around for extent, around in zip(reach, convolution.padding, strict=True)]
    spread = [edge + around - beyond for edge, around, beyond in zip(size, convolution.padding, padding, strict=True)]
    shape = (*gy.shape[:2], *spread)
    sparse = torch.empty(shape, dtype=gy.dtype, device=gy.device, memory_format=torch.channels_last).zero_()
    sparse[..., :: stride[0], :: stride[1]] = gy
    return F.conv2d(sparse, weight.flip(2, 3), None, 1, padding, convolution.dilation, convolution.groups)


def choose(convolution: Convolution, dtype: torch.dtype) -> InputGradient | None:
    """The fastest way on CPU for activations of ``dtype``; None where the library's own is."""
    outputs, inputs, *kernel = convolution.weight.shape
    is_reduced = dtype == torch.bfloat16
    if convolution.groups == 1 and inputs <= STEM_CHANNELS:
        if not is_reduced:
            return by_columns
        is_square = convolution.stride[0] == convolution.stride[1]
        return by_subpixels if is_square and convolution.dilation == (1, 1) else None
    is_depthwise = inputs == 1 and convolution.groups == outputs
    reaches = all(
        around <= spacing * (taps - 1)
        for around, spacing, taps in zip(convolution.padding, convolution.dilation, kernel, strict=True)
    )
    return by_spreading if is_reduced and is_depthwise and reaches and max(convolution.stride) > 1 else None


class _Convolve(torch.autograd.Function):
    """A frozen convolution whose backward pass keeps nothing and uses the chosen input gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, convolution: Convolution, gradient: InputGradient) -> Tensor:
        ctx.convolution, ctx.gradient = convolution, gradient
        ctx.size = (x.shape[2], x.shape[3])
        return convolution(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gx: Tensor = ctx.gradient(ctx.convolution, gradients[0], ctx.size)
        return gx, None, None


class FastInputGradients(TorchFunctionMode):
    """While it is entered, frozen convolutions on CPU get the input gradient that is fastest there.

    A mode and not a replaced module, because networks that pad for themselves (timm's and others' "same" padding)
    call ``conv2d`` from layers of their own.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Intercept ``conv2d``; everything else is as it was."""
        if func is torch.conv2d:
            return _conv2d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _conv2d(
    input: Tensor,  # noqa: A002 - torch's name
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    is_plain = input.ndim == 4 and input.device.type == "cpu" and not isinstance(padding, str)
    is_frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    if is_plain and is_frozen and input.requires_grad and torch.is_grad_enabled() and not _is_checkpointed():
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
        convolution = Convolution(
            weight=weight,
            bias=bias,
            stride=_pair(stride),
            padding=_pair(padding),
            dilation=_pair(dilation),
            groups=groups,
        )
        gradient = choose(convolution, dtype)
        if gradient is not None:
            own = convolution.to(dtype)
            return _Convolve.apply(input.to(dtype), own, gradient)  # type: ignore[no-any-return]  # untyped
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _is_checkpointed() -> bool:
    """Whether what is saved here is computed again in the backward pass: outside the mode, by the library's own way."""
    return not torch.compiler.is_compiling() and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else (value * 2 if len(value) == 1 else value)
    return int(first), int(second)
