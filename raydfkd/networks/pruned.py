"""The teacher itself with some of its channels: a student that begins with what its teacher knows."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from raydfkd.config.schema import PositiveFraction
from raydfkd.networks.build import NETWORKS

LAYERS = (nn.Linear, _ConvNd)
"""Kinds of layers whose outputs are channels that may go."""


@NETWORKS.register("pruned_teacher")
def pruned_teacher(
    network: nn.Module, classes: int, shape: tuple[int, int, int], *, keep: PositiveFraction = 0.5
) -> nn.Module:
    """The teacher's own network with a part of each layer's channels, and their weights to begin its training with.

    Channels that belong together, through sums and normalisations, stay or go together; those of the smallest weights
    go. Half of them is a quarter of the weights and of the work. Numbers of classes and of the image's channels stay.
    Only a student can be it. Sources: Li et al. 2017, Fang et al. 2023 (DepGraph), by the library torch-pruning.

    Args:
        keep: share of the channels of each layer.
    """
    import torch_pruning

    try:
        # the warnings say that weights outside of layers are pruned in the only way that there is
        with torch.inference_mode(mode=False), torch.enable_grad(), warnings.catch_warnings(action="ignore"):
            images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
            pruned = copy.deepcopy(network).eval().requires_grad_(True)
            torch_pruning.pruner.MagnitudePruner(
                pruned,
                images,
                importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=1 - keep,
                ignored_layers=_answering_layers(pruned, classes, images),
                out_channel_groups={  # the same channels of each head, or heads would be mixed
                    module: module.num_heads for module in pruned.modules() if isinstance(module, nn.MultiheadAttention)
                },
            ).step()
        with torch.no_grad():
            pruned(images)
        if keep < 1 and sum(map(torch.numel, pruned.parameters())) == sum(map(torch.numel, network.parameters())):
            raise ValueError("no layer has channels that may go")
    except Exception as error:  # what a network does in its forward may be anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"the teacher's channels cannot be pruned ({reason[:200]}); name another network") from error
    return pruned


def _answering_layers(network: nn.Module, classes: int, images: torch.Tensor) -> list[nn.Module]:
    """The layer that makes the answer, and those with an output for each class, which may."""
    layers = [module for module in network.modules() if isinstance(module, LAYERS)]
    return [last_layer(network, images), *(layer for layer in layers if layer.weight.shape[0] == classes)]


def last_layer(network: nn.Module, images: torch.Tensor) -> nn.Module:
    """The linear layer or convolution that is called last for ``images`` [N, C, H, W].

    Raises:
        ValueError: there is none.
    """
    called: list[nn.Module] = []
    layers = [module for module in network.modules() if isinstance(module, LAYERS)]
    hooks = [layer.register_forward_hook(lambda module, *_: called.append(module)) for layer in layers]
    try:
        with torch.no_grad():
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not called:
        raise ValueError("it has no linear layer and no convolution")
    return called[-1]
