"""Layers of a frozen network: the same answers, backward passes that compute the gradient of the input alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

STEM_CHANNELS = 4
"""Input channels up to which a convolution's input gradient is computed by a matrix product on CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMoments:
    """One BatchNorm layer's input: what this batch has and what training stored.

    ``mean`` and ``var`` (biased) are [G, C] for G equal, contiguous groups of the batch; the stored ones [C].
    """

    mean: Tensor
    var: Tensor
    running_mean: Tensor
    running_var: Tensor

    def pooled(self) -> LayerMoments:
        """The moments of all groups together, exactly (groups are of one size): mean and var are [1, C]."""
        if len(self.mean) == 1:
            return self
        mean = self.mean.mean(0, keepdim=True)
        var = self.var.mean(0, keepdim=True) + self.mean.var(0, correction=0, keepdim=True)
        return LayerMoments(mean=mean, var=var, running_mean=self.running_mean, running_var=self.running_var)


def specialize(module: nn.Module, *, moments: list[ObservedBatchNorm] | None) -> nn.Module:
    """Replace layers of a frozen ``module`` in place: modules rather than hooks, so that graphs can fuse.

    With ``moments``, each BatchNorm layer gets an observing twin, which is appended to that list.
    """
    if moments is not None and isinstance(module, _BatchNorm) and module.track_running_stats:
        moments.append(ObservedBatchNorm(module))
        return moments[-1]
    if type(module) is nn.Conv2d and StemConvolution.suits(module):
        return StemConvolution(module)
    for name, child in module.named_children():
        setattr(module, name, specialize(child, moments=moments))
    return module


class _ConvolveFromFewChannels(torch.autograd.Function):
    """A convolution whose input gradient is a matrix product and a scatter-add of its columns.

    With one to four input channels oneDNN's own takes five times as long as the arithmetic.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Conv2d) -> Tensor:
        ctx.layer = layer
        ctx.size = x.shape[2:]
        return layer(x)  # type: ignore[no-any-return]  # a module's call is untyped

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        layer: nn.Conv2d = ctx.layer
        columns = layer.weight.flatten(1).t() @ gradients[0].flatten(2)
        assert not isinstance(layer.padding, str)
        gx = F.fold(columns, ctx.size, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return gx, None


class StemConvolution(nn.Module):
    """Stands where a frozen network's first convolution stood."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer

    @staticmethod
    def suits(layer: nn.Conv2d) -> bool:
        """Whether the matrix product is the same function and the faster one."""
        is_plain = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return is_plain and layer.in_channels <= STEM_CHANNELS

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] to maps."""
        if x.requires_grad and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            return _ConvolveFromFewChannels.apply(x, self.layer)  # type: ignore[no-any-return]  # apply is untyped
        return self.layer(x)  # type: ignore[no-any-return]  # a module's call is untyped


class _NormalizeWithMoments(torch.autograd.Function):
    """Frozen BatchNorm and the moments of its input as one step of the graph.

    Autograd's own backward of ``var_mean`` and ``batch_norm`` makes about four passes over the activations and keeps
    copies; written out, the gradient is ``gy * scale + a + b * x`` with a and b per group and channel.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        var, mean = _moments(x, groups)
        per_channel = (1, -1, *(1,) * (x.ndim - 2))
        y = torch.addcmul(shift.view(per_channel), x, scale.view(per_channel)).to(x.dtype)
        ctx.save_for_backward(x, scale, mean)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        gy, gmean, gvar = gradients
        x, scale, mean = ctx.saved_tensors
        groups, channels = mean.shape
        count = x.numel() // (groups * channels)
        slope = gvar * (2.0 / count)
        offset = gmean / count - slope * mean
        per_channel = (1, -1, *(1,) * (x.ndim - 2))
        gx = gy * scale.view(per_channel).to(gy.dtype)
        shape = (groups, 1, channels, *(1,) * (x.ndim - 2))
        grouped = gx.view(groups, -1, *gx.shape[1:])
        grouped.addcmul_(x.reshape(grouped.shape), slope.view(shape).to(gx.dtype))
        grouped.add_(offset.view(shape).to(gx.dtype))
        return gx, None, None, None


def _moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Biased variance and mean [G, C] of ``x`` [N, C, ...] over each group and all positions.

    ``var_mean`` over (0, 2, 3) is many times slower on CPU than either of these: products with a row of ones where
    channels lie innermost, else a reduction of the contiguous positions first. What is small is combined in float64,
    so that the subtraction of the squared mean keeps its digits.
    """
    x = x.float()
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and x.shape[1] > 1:
        rows = x.permute(0, 2, 3, 1).reshape(groups, -1, x.shape[1])
        ones = x.new_ones(groups, 1, rows.shape[1])
        first = torch.bmm(ones, rows)[:, 0].double() / rows.shape[1]
        second = torch.bmm(ones, rows.square())[:, 0].double() / rows.shape[1]
    else:
        positions = x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)
        first = positions.mean(2).double().unflatten(0, (groups, -1)).mean(1)
        second = torch.linalg.vector_norm(positions, dim=2).double().square().unflatten(0, (groups, -1)).mean(1)
        second = second / positions.shape[2]
    return (second - first.square()).clamp_min(0).float(), first.float()


class ObservedBatchNorm(nn.Module):
    """Stands where a frozen BatchNorm stood; appends the moments of its input to ``trace``, if there is one."""

    scale: Tensor
    shift: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        weight = norm.weight if norm.affine else torch.ones_like(norm.running_var)
        bias = norm.bias if norm.affine else torch.zeros_like(norm.running_mean)
        scale = weight.detach() * (norm.running_var + norm.eps).rsqrt()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", bias.detach() - norm.running_mean * scale)
        self.register_buffer("running_mean", norm.running_mean.clone())
        self.register_buffer("running_var", norm.running_var.clone())
        self.groups = 1
        self.trace: list[LayerMoments] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [N, C, ...] by the running statistics, and note its moments."""
        y, mean, var = _NormalizeWithMoments.apply(x, self.scale, self.shift, self.groups)
        if self.trace is not None:
            self.trace.append(
                LayerMoments(mean=mean, var=var, running_mean=self.running_mean, running_var=self.running_var)
            )
        return y  # type: ignore[no-any-return]  # autograd.Function.apply is untyped
