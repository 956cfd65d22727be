"""BatchNorm layers of a frozen network, with the moments of their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from raydfkd.errors import RecipeError


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


def observe_batchnorm(module: nn.Module, found: list[ObservedBatchNorm]) -> nn.Module:
    """Replace each BatchNorm layer of a frozen ``module``, in place, by an observing twin and add that to ``found``.

    Modules rather than hooks, so that a compiled network with its moments is one graph.

    Raises:
        RecipeError: a layer that is derived from BatchNorm and does something else.
    """
    if isinstance(module, _BatchNorm) and module.track_running_stats:
        found.append(ObservedBatchNorm(module))
        return found[-1] if type(module).forward is _BatchNorm.forward else _with_children(found[-1], module)
    for name, child in module.named_children():
        setattr(module, name, observe_batchnorm(child, found))
    return module


def _with_children(observed: ObservedBatchNorm, norm: _BatchNorm) -> nn.Module:
    """For layers such as timm's, whose normalisation is followed by an activation of their own."""
    twin = nn.Sequential(observed, *norm.children())
    sizes = {nn.BatchNorm2d: (3, 3), nn.BatchNorm3d: (3, 3, 3)}
    positions = next((size for kind, size in sizes.items() if isinstance(norm, kind)), ())
    probe = torch.linspace(-9, 9, 2 * norm.num_features).view(2, -1, *(1,) * len(positions)).expand(2, -1, *positions)
    probe = probe.to(observed.scale.device)
    if not torch.allclose(twin(probe), norm(probe), rtol=1e-3, atol=1e-3):
        raise RecipeError(
            f"synthesis.objective has bn_moments, but the teacher's {type(norm).__name__} is no plain BatchNorm; "
            "drop the term"
        )
    return twin


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
        count = x.numel() // (groups * channels)
        slope = gvar * (2.0 / count)
        offset = gmean / count - slope * mean
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


def _is_reduced(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *(1,) * (x.ndim - 2)).to(x.dtype)


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``x * scale + shift`` by channel in one pass; a reduced type is computed in float32 and rounded once."""
    if _is_reduced(x):
        zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
        return F.batch_norm(x, zeros, ones, scale, shift, training=False, eps=0.0)
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

    What is small is combined in float64, so that the subtraction of the squared mean keeps its digits.
    """
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
