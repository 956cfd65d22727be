"""A network plus what the objective needs to see of its inside."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from raydfkd.registry import RecipeError


class Need(Enum):
    """What a term reads beyond images, targets and the teacher's logits."""

    FEATURES = "features"
    """Input of the teacher's last linear layer."""
    MOMENTS = "moments"
    """BatchNorm statistics of the whole batch beside those that training stored."""
    CLASS_MOMENTS = "class_moments"
    """The same, for each class of the batch by itself."""
    STUDENT = "student"
    """The student's logits."""
    LATENTS = "latents"
    """Latents that a generator made the images from."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What a network says of a batch of N images."""

    logits: Tensor
    """[N, K]."""
    features: Tensor | None = None
    """[N, D]."""
    moments: tuple[LayerMoments, ...] = ()
    """One entry a BatchNorm layer, in the order in which the forward pass meets them."""


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

    Reducing the contiguous inner dimension first is many times faster on CPU than ``var_mean`` over (0, 2, 3); the
    small per-image sums are then combined in float64, so that the subtraction of the squared mean keeps its digits.
    """
    rows = x.float().flatten(2) if x.ndim > 2 else x.float().unsqueeze(2)
    first = rows.mean(2).double().unflatten(0, (groups, -1)).mean(1)
    second = torch.linalg.vector_norm(rows, dim=2).double().square().unflatten(0, (groups, -1)).mean(1) / rows.shape[2]
    return (second - first.square()).clamp_min(0).float(), first.float()


class _ObservedBatchNorm(nn.Module):
    """Stands where a frozen BatchNorm stood; leaves the moments of its last input in ``seen``."""

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
        y, mean, var = _NormalizeWithMoments.apply(x, self.scale, self.shift, self.groups)
        if self.trace is not None:
            self.trace.append(
                LayerMoments(mean=mean, var=var, running_mean=self.running_mean, running_var=self.running_var)
            )
        return y  # type: ignore[no-any-return]  # autograd.Function.apply is untyped


def batchnorm_layers(module: nn.Module) -> list[_BatchNorm]:
    """BatchNorm layers that hold running statistics."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]


class ObservedNetwork:
    """A network as the judge sees it: only the ``taps`` asked for are installed, and they cost nothing otherwise.

    A frozen network is copied, put in eval mode and takes no gradients to its weights, so a backward pass only
    computes the gradient of its input. A live one (a student) is used as it is; ``batchnorm`` says whether it
    normalises by its running statistics or by those of the batch.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        taps: frozenset[Need] = frozenset(),
        frozen: bool,
        batchnorm: Literal["running", "batch"] = "running",
        precision: torch.dtype = torch.float32,
    ) -> None:
        self._module = copy.deepcopy(module).eval().requires_grad_(False) if frozen else module
        self._batchnorm = batchnorm
        self._precision = precision
        self._observed: list[_ObservedBatchNorm] = []
        self._features: list[Tensor] = []
        if taps & {Need.MOMENTS, Need.CLASS_MOMENTS}:
            assert frozen, "moments are taken of a frozen network"
            self._module = _replace_batchnorm(self._module, self._observed)
            if not self._observed:
                raise RecipeError("the objective reads BatchNorm moments, but the teacher has no BatchNorm layer")
        if Need.FEATURES in taps:
            last = [layer for layer in self._module.modules() if isinstance(layer, nn.Linear)]
            if not last:
                raise RecipeError("the objective reads features, but the teacher has no final linear layer")
            last[-1].register_forward_pre_hook(lambda _, inputs: self._features.append(inputs[0]))

    def to(self, device: torch.device | str) -> ObservedNetwork:
        """Move to ``device``, in place."""
        self._module.to(device)
        return self

    def __call__(self, images: Tensor, *, groups: int = 1) -> Observation:
        """Observe ``images`` [N, C, H, W]; moments are taken over ``groups`` equal, contiguous parts of the batch."""
        trace: list[LayerMoments] = []
        for layer in self._observed:
            layer.groups, layer.trace = groups, trace
        self._features.clear()
        with self._batchnorm_mode(), torch.autocast(images.device.type, self._precision, self._is_mixed):
            logits = self._module(images)
        return Observation(
            logits=logits.float(),
            features=self._features[-1].flatten(1).float() if self._features else None,
            moments=tuple(trace),
        )

    @property
    def _is_mixed(self) -> bool:
        return self._precision != torch.float32

    @contextmanager
    def _batchnorm_mode(self) -> Iterator[None]:
        if self._batchnorm == "batch" or not self._module.training:
            yield
            return
        self._module.eval()
        try:
            yield
        finally:
            self._module.train()


def _replace_batchnorm(module: nn.Module, replaced: list[_ObservedBatchNorm]) -> nn.Module:
    """Put an observing twin in the place of each BatchNorm (modules rather than hooks, so that graphs can fuse)."""
    if isinstance(module, _BatchNorm) and module.track_running_stats:
        replaced.append(_ObservedBatchNorm(module))
        return replaced[-1]
    for name, child in module.named_children():
        setattr(module, name, _replace_batchnorm(child, replaced))
    return module
