"""BatchNorm layers of a frozen network, with the moments of their inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from typing_extensions import override

from raydfkd.errors import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMoments:
    """One BatchNorm layer's input: what this batch has and what training stored.

    ``mean`` and ``var`` (biased) are [G, C] for G equal, contiguous groups of the batch; the stored ones [C]. Where
    moments were measured, the layer may be another, see ``networks.measured``, and the stored ones are those.
    """

    mean: Tensor
    var: Tensor
    running_mean: Tensor
    running_var: Tensor
    layer: str = ""
    """Path of the layer in its network."""

    def pooled(self, groups: int = 1) -> LayerMoments:
        """Moments [groups, C] of larger parts of the batch, exactly: each is of equally many of these groups."""
        if len(self.mean) == groups:
            return self
        means, variances = (moment.unflatten(0, (groups, -1)) for moment in (self.mean, self.var))
        mean = means.mean(1)
        var = variances.mean(1) + means.var(1, correction=0)
        return replace(self, mean=mean, var=var)


class MomentsTrace:
    """Where the BatchNorm layers of one network note their moments, in the order in which the forward pass meets them.

    A layer is told by its running mean: each one of the network becomes a tensor that knows its layer, and whoever
    normalises by it notes the moments of what is normalised: the layer itself, one derived from it, ``batch_norm``
    called with its attributes, an exported graph. The modules stay what they are, with their types and hooks, and a
    compiled network with its moments is one graph.
    """

    def __init__(self) -> None:
        self.groups = 1
        """Equal, contiguous parts of the batch over each of which moments are taken."""
        self.notes: list[LayerMoments] | None = None
        """Moments of this forward pass; None where nobody asks, as when a checkpointed block is computed again."""

    def attach(self, network: nn.Module) -> None:
        """Put the layers of a frozen ``network`` on this trace, in place; again after it was moved to a device."""
        for name, layer in layers_with_statistics(network):
            mean = layer._buffers["running_mean"]
            assert mean is not None
            observed = mean.detach().as_subclass(_ObservedMean)
            observed.layer = _Layer(name, self, observed.detach())
            layer._buffers["running_mean"] = observed

    def note(self, layer: str, mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor) -> None:
        """Add a layer's moments, where somebody asks."""
        if self.notes is not None:
            self.notes.append(
                LayerMoments(layer=layer, mean=mean, var=var, running_mean=running_mean, running_var=running_var)
            )

    def refuse_rows(self, layer: str, rows: int) -> None:
        """Refuse to take moments of each group in a layer that gets ``rows`` which cannot be shared out."""
        if rows % self.groups:
            raise RecipeError(
                f"moments are wanted of each of {self.groups} parts of a batch, but the layer {layer} gets {rows} "
                "rows; take those of the whole batch (scope: batch)"
            )


def layers_with_statistics(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of every layer that has a running mean and variance, of torch's classes and of others'.

    Those of InstanceNorm are left out, whose running variance is none of a batch, and TorchScript's, which cannot be
    observed.
    """
    return [
        (name, module)
        for name, module in network.named_modules()
        if not isinstance(module, (_InstanceNorm, torch.jit.ScriptModule))
        and all(module._buffers.get(statistic) is not None for statistic in ("running_mean", "running_var"))
    ]


def normalize_by_kernel(layer: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Let ``layer``, which writes its normalisation out, call ``batch_norm``, in place, where that is the same.

    Says whether it is: its output ``y`` of ``x`` is that of BatchNorm with its statistics, and then of its children, as
    in torchvision's FrozenBatchNorm2d and in layers with an activation of their own.
    """
    fits = x.ndim > 1 and layer._buffers["running_mean"].shape == x.shape[1:2]  # type: ignore[union-attr]  # not None
    if not fits or isinstance(layer, _BatchNorm):
        return False
    with torch.no_grad():
        expected = _normalize_then_children(layer, x)
        if expected.shape != y.shape or not torch.allclose(expected, y, rtol=1e-3, atol=1e-3):
            return False
    layer.forward = MethodType(_normalize_then_children, layer)
    return True


def _normalize_then_children(self: Any, x: Tensor) -> Tensor:
    weight, bias = getattr(self, "weight", None), getattr(self, "bias", None)
    y = F.batch_norm(x, self.running_mean, self.running_var, weight, bias, False, 0.0, getattr(self, "eps", 1e-5))
    for child in self.children():
        y = child(y)
    return y


class _Layer:
    """A BatchNorm layer as its running mean knows it."""

    def __init__(self, name: str, trace: MomentsTrace, mean: Tensor) -> None:
        self.name, self.trace, self.mean = name, trace, mean
        self._key: tuple[Tensor | None, Tensor | None, Tensor, float] | None = None
        self._affine: tuple[Tensor, Tensor] | None = None

    def affine(
        self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Scale and shift [C] of the normalisation; computed once, since nothing of a frozen layer changes."""
        if torch.compiler.is_compiling():
            return _affine_of(mean, var, weight, bias, eps)
        key = (weight, bias, var, eps)
        if self._affine is None or self._key is None or any(a is not b for a, b in zip(key, self._key, strict=True)):
            self._key, self._affine = key, _affine_of(mean, var, weight, bias, eps)
        return self._affine


def _affine_of(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    scale = (torch.ones_like(var) if weight is None else weight) * (var + eps).rsqrt()
    return scale, (torch.zeros_like(mean) if bias is None else bias) - mean * scale


class _ObservedMean(Tensor):
    """The running mean of a layer on a trace."""

    layer: _Layer

    @classmethod
    @override
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.batch_norm:
                return _batch_norm(*args, **options)
            if func in (torch.batch_norm, torch.ops.aten.batch_norm.default):
                return _batch_norm_by_position(*args, **options)
            if func is torch.ops.aten._native_batch_norm_legit_no_training.default:
                y = _native_batch_norm(*args, **options)
                return y, y.new_empty(0), y.new_empty(0)
            return func(*args, **options)  # what is computed of the mean is a tensor like any other


def _batch_norm_by_position(  # noqa: PLR0913, PLR0917 - torch's signature
    input: Tensor,  # noqa: A002 - torch's name
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _native_batch_norm(  # noqa: PLR0913, PLR0917 - torch's signature
    input: Tensor,  # noqa: A002 - torch's name
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> Tensor:
    return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)


def _batch_norm(  # noqa: PLR0913, PLR0917 - torch's signature
    input: Tensor,  # noqa: A002 - torch's name
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.batch_norm`` that notes the moments of its input with the layer of ``running_mean``."""
    if not isinstance(running_mean, _ObservedMean):  # another argument has brought us here
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    layer = running_mean.layer
    trace, stored = layer.trace, layer.mean
    trace.refuse_rows(layer.name, input.shape[0])
    if training or any(value is not None and value.requires_grad for value in (weight, bias)):
        var, mean = _moments_with_graph(input, trace.groups)
        y = F.batch_norm(input, stored, running_var, weight, bias, training, momentum, eps)
    else:
        scale, shift = layer.affine(stored, running_var, weight, bias, eps)
        y, mean, var = _NormalizeWithMoments.apply(input, scale, shift, trace.groups)
    trace.note(layer.name, mean, var, stored, running_var)
    return y


class _NormalizeWithMoments(torch.autograd.Function):
    """Frozen BatchNorm and the moments of its input as one step of the graph.

    Autograd's own backward of ``var_mean`` and ``batch_norm`` makes about four epochs over the activations and keeps
    copies; written out, the gradient is ``gy * scale + a + b * x`` with a and b per group and channel.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        var, mean = _moments(x, groups)
        ctx.save_for_backward(x, scale, mean)
        return _affine(x, scale, shift), mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        gy, gmean, gvar = gradients
        x, scale, mean = ctx.saved_tensors
        groups, channels = mean.shape
        offset, slope = _gradient_of_moments(gmean, gvar, mean, x.numel() // (groups * channels))
        if _is_reduced(x):
            parts = zip(gy.chunk(groups), x.chunk(groups), offset, slope, strict=True)
            gxs = [_affine(g, scale, a).addcmul_(part, _per_channel(b, part)) for g, part, a, b in parts]
            return torch.cat(gxs) if groups > 1 else gxs[0], None, None, None
        gx = gy * _per_channel(scale, gy)
        shape = (groups, 1, channels, *(1,) * (x.ndim - 2))
        grouped = gx.view(groups, -1, *gx.shape[1:])
        grouped.addcmul_(x.reshape(grouped.shape), slope.view(shape))
        grouped.add_(offset.view(shape))
        return gx, None, None, None


def moments_of(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [G, C] of ``x`` [N, C, ...] over each group and all positions, in float32."""
    mean, var = _Moments.apply(x, groups)
    return mean, var


class _Moments(torch.autograd.Function):
    """The moments as one step of the graph, whose gradient is ``a + b * x`` with a and b per group and channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        var, mean = _moments(x, groups)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gmean, gvar = gradients
        x, mean = ctx.saved_tensors
        groups, channels = mean.shape
        offset, slope = _gradient_of_moments(gmean, gvar, mean, x.numel() // (groups * channels))
        shape = (groups, 1, channels, *(1,) * (x.ndim - 2))
        grouped = x.unflatten(0, (groups, -1))
        gx = torch.addcmul(offset.view(shape), grouped, slope.view(shape))
        return gx.flatten(0, 1).to(x.dtype), None


def _gradient_of_moments(gmean: Tensor, gvar: Tensor, mean: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Offset and slope [G, C], over ``x``, of the gradient that those of moments over ``count`` numbers lead to."""
    slope = gvar * (2.0 / count)
    return gmean / count - slope * mean, slope


def _is_reduced(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *(1,) * (x.ndim - 2)).to(x.dtype)


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``x * scale + shift`` by channel in one pass; a reduced type is computed in float32 and rounded once."""
    if _is_reduced(x):
        zeros = torch.zeros_like(scale)
        return F.batch_norm(x, zeros, zeros, scale, shift, training=False, eps=1.0)  # an eps of 0 is refused
    return torch.addcmul(_per_channel(shift, x), x, _per_channel(scale, x))


def _moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Biased variance and mean [G, C] of ``x`` [N, C, ...] over each group and all positions, in float32.

    ``var_mean`` over (0, 2, 3) is many times slower on CPU than what is used there.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return _moments_by_sums(x, groups)
    return _moments_by_kernel(x, groups) if _is_reduced(x) else _moments_by_products(x.float(), groups)


def _moments_by_sums(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Two reductions that a compiler makes one and that read a reduced type without a copy in float32."""
    positions = x.unflatten(0, (groups, -1))
    dims = [dim for dim in range(positions.ndim) if dim not in (0, 2)]
    count = x.numel() // (groups * x.shape[1])
    first = (positions.sum(dims, dtype=torch.float32) / count).double()
    second = torch.linalg.vector_norm(positions, dim=dims, dtype=torch.float32).double().square() / count
    return (second - first.square()).clamp_min(0).float(), first.float()


def _moments_by_kernel(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """BatchNorm's own statistics, accumulated in float32 without a copy in it."""
    scratch = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    pairs = [torch.ops.aten.batch_norm_update_stats(part, *scratch, 0.0) for part in x.chunk(groups)]
    return torch.stack([var for _, var in pairs]), torch.stack([mean for mean, _ in pairs])


def _moments_by_products(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Products with a row of ones where channels lie innermost, else a reduction of the contiguous positions first.

    Images are added up in float64, so that the subtraction of the squared mean keeps its digits.
    """
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and x.shape[1] > 1:
        rows = x.permute(0, 2, 3, 1).flatten(1, 2)
        first, second = (_sums(values).unflatten(0, (groups, -1)).mean(1) for values in (rows, rows.square()))
        first, second = first / rows.shape[1], second / rows.shape[1]
    else:
        positions = x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)
        first = positions.mean(2).double().unflatten(0, (groups, -1)).mean(1)
        second = torch.linalg.vector_norm(positions, dim=2).double().square().unflatten(0, (groups, -1)).mean(1)
        second = second / positions.shape[2]
    return (second - first.square()).clamp_min(0).float(), first.float()


def _sums(rows: Tensor) -> Tensor:
    """Sums over the positions of each image: [N, P, C] to [N, C] in float64."""
    with torch.autocast("cpu", enabled=False):  # which would round the sums to bfloat16
        return torch.bmm(rows.new_ones(len(rows), 1, rows.shape[1]), rows)[:, 0].double()


def _moments_with_graph(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """As ``_moments``, differentiated step by step: for layers whose weights depend on the images."""
    positions = x.float().unflatten(0, (groups, -1))
    var, mean = torch.var_mean(positions, [dim for dim in range(positions.ndim) if dim not in (0, 2)], correction=0)
    return var, mean
