"""Moments that pictures have inside a network, in layers of any kind, in the place of those that BatchNorm stored.

They are of the input of every norm layer; in a network without any, of the output of every convolution and of every
linear layer but the one that makes the logits. BatchNorm layers with statistics are those of ``networks.batchnorm``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from raydfkd.networks.batchnorm import LayerMoments, MomentsTrace, layers_with_statistics, moments_of

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_ROW_WISE = (nn.LayerNorm.forward, nn.RMSNorm.forward, nn.Linear.forward)
"""Forward passes that work on the last axis of what they get; subclasses with others may turn it before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """A layer of which moments are taken beside BatchNorm's."""

    path: str
    layer: nn.Module
    is_norm: bool
    """Whether its input is what counts, else its output."""

    def watch(self, trace: MomentsTrace) -> None:
        """Note the moments on ``trace`` at every call from now on; compared with themselves until others are known."""

        def note(x: Any) -> None:
            if not isinstance(x, Tensor):
                return
            trace.refuse_rows(self.path, len(x))
            mean, var = moments_of(_with_channels_second(self.layer, x), trace.groups)
            trace.note(self.path, mean, var, mean[0].detach(), var[0].detach())

        def before(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            note(next(iter((*inputs, *named.values())), None))

        def after(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            note(output)
            return output.clone() if isinstance(output, Tensor) else output  # a ReLU behind it may work in place

        if self.is_norm:
            self.layer.register_forward_pre_hook(before, with_kwargs=True)
        else:
            self.layer.register_forward_hook(after)


def watched_layers(network: nn.Module, *, head: str | None) -> list[Watched]:
    """The layers of ``network`` to watch beside BatchNorm's that have statistics.

    Args:
        network: whatever can be hooked, so nothing of TorchScript.
        head: path of the layer that makes the logits, which is not watched.
    """
    known = dict(layers_with_statistics(network))
    layers = {path: layer for path, layer in network.named_modules() if not isinstance(layer, torch.jit.ScriptModule)}
    norms = [path for path, layer in layers.items() if path not in known and is_norm(layer)]
    if norms or known:
        return [Watched(path=path, layer=layers[path], is_norm=True) for path in norms]
    return [
        Watched(path=path, layer=layer, is_norm=False)
        for path, layer in layers.items()
        if isinstance(layer, (_ConvNd, nn.Linear)) and path != head
    ]


def is_norm(layer: nn.Module) -> bool:
    """Whether it is one of torch's norm layers or one of them, or a layer without others in it that is called so."""
    is_called_so = re.search(r"norm(\d?d)?$", type(layer).__name__, re.IGNORECASE) is not None
    return isinstance(layer, _NORMS) or (is_called_so and not [*layer.children()])


def _with_channels_second(layer: nn.Module, x: Tensor) -> Tensor:
    """``x`` as [N, C, ...]: tokens [N, L, C] and maps [N, H, W, C] are turned, with the strides of channels last."""
    if x.ndim < 3 or _has_channels_second(layer, x):
        return x
    turned = x.movedim(-1, 1)
    return turned.unsqueeze(-1) if x.ndim == 3 else turned


def _has_channels_second(layer: nn.Module, x: Tensor) -> bool:
    if isinstance(layer, (_NormBase, nn.GroupNorm, _ConvNd)):
        return True
    if type(layer).forward in _ROW_WISE:
        return len(getattr(layer, "normalized_shape", ())) > 2  # then [C, H, W], as in LayerNorm over whole maps
    weight = getattr(layer, "weight", None)
    return x.ndim > 3 and (weight is None or weight.numel() == x.shape[1])


def joined_moments(batches: Sequence[tuple[int, Sequence[LayerMoments]]]) -> tuple[LayerMoments, ...]:
    """The moments of all images as stored ones, exactly, from those of batches with their numbers of images.

    Every batch has met the same layers, and a layer has as many positions in each image.
    """
    counts = [count for count, _ in batches]
    joined = []
    for notes in zip(*(notes for _, notes in batches), strict=True):
        means = torch.cat([one.mean for one in notes]).double()
        seconds = torch.cat([one.var for one in notes]).double() + means.square()
        shares = means.new_tensor(counts) / sum(counts)
        mean = shares @ means
        var = (shares @ seconds - mean.square()).clamp_min(0)
        mean, var = mean.float(), var.float()
        joined.append(replace(notes[0], mean=mean[None], var=var[None], running_mean=mean, running_var=var))
    return tuple(joined)
