"""Generators: latents to images; and many of them as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F
from typing_extensions import override

from raydfkd.config.registry import Registry
from raydfkd.config.schema import Count, ImageSpace, Positive

GENERATORS: Registry[nn.Module] = Registry("generator", [], member="latent")
"""Made of an image space and options; modules without buffers from latents [N, latent] to images [N, C, H, W] in
[0, 1], whose ``latent`` is how many random numbers an image is made of."""


@GENERATORS.register("conv")
class ConvGenerator(nn.Sequential):
    """Linear layer to a small map, then doublings (nearest neighbour) with 3x3 convolutions; sigmoid.

    BatchNorm always uses the batch at hand, so the module has no state but its weights. Modelled on the generators
    of Chen et al. 2019 (DAFL) and Luo et al. 2020, narrower unless told otherwise, with ordinary BatchNorm eps and a
    sigmoid in place of tanh and a last BatchNorm. Luo et al. have width 128, with latent 1024 and 2 doublings at
    32 px; with latent 512, 4 doublings and taper harmonic at 224 px.

    Args:
        latent: size of the latent vector.
        width: channels of the first map, and of the map after the first doubling.
        doublings: times the image grows by two; the image size must be divisible by 2 to this power.
        taper: channels after doubling i, from 0; halving is width / 2**i, harmonic width / (i + 1), at least 4.
    """

    def __init__(
        self,
        space: ImageSpace,
        *,
        latent: Positive = 32,
        width: Positive = 16,
        doublings: Count = 2,
        taper: Literal["halving", "harmonic"] = "halving",
    ) -> None:
        edges = (space.height, space.width)
        if any(edge % (1 << doublings) for edge in edges):
            most = next(fewer for fewer in reversed(range(doublings)) if not any(edge % (1 << fewer) for edge in edges))
            raise ValueError(
                f"doublings is {doublings}, but image size {space.size_text} is not divisible by {1 << doublings}; "
                f"use at most {most}"
            )
        rows, columns = (edge >> doublings for edge in edges)
        layers: list[nn.Module] = [nn.Linear(latent, width * rows * columns), nn.Unflatten(1, (width, rows, columns))]
        layers += _norm_relu(width)
        inputs = width
        for doubling in range(doublings):
            outputs = max(width >> doubling if taper == "halving" else width // (doubling + 1), 4)
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)]
            layers += _norm_relu(outputs)
            inputs = outputs
        super().__init__(*layers, nn.Conv2d(inputs, space.channels, 3, padding=1), nn.Sigmoid())
        self.latent = latent


def _norm_relu(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels, track_running_stats=False), nn.LeakyReLU(0.2)]


StackForm = Literal["auto", "loop", "vmap", "grouped"]


class StackedGenerators(nn.Module):
    """P generators of one architecture as one module: parameters [P, ...], latents [P, N, Z] to [P * N, C, H, W].

    ``loop`` runs them one after another. ``vmap`` runs them together, and so does ``grouped``, as the groups of one
    channels_last network, for generators that are ``nn.Sequential`` of a linear layer, convolutions, BatchNorm and
    what works pixel by pixel. The images are the same to rounding, the last bit is not, so ``auto`` goes by device and
    architecture alone: on CPU ``grouped`` where possible (measured faster than the other two from width 16 to 128,
    `raydfkd bench generators`) and otherwise ``loop``, on a GPU ``vmap``. One optimiser step over the stacked
    parameters serves all P in any form.
    """

    def __init__(self, generators: Sequence[nn.Module], *, form: StackForm = "auto") -> None:
        super().__init__()
        parameters, buffers = stack_module_state(list(generators))
        assert not buffers, "a stacked generator holds no state but its weights"
        self._names = tuple(parameters)
        self.stacked = nn.ParameterList([nn.Parameter(parameters[name].detach()) for name in self._names])
        self._template = (generators[0],)  # in a tuple, so that its weights are not registered as ours
        self._form = form
        if form == "grouped" and not can_group(generators[0]):
            raise ValueError("form is 'grouped', but this generator has layers that cannot be; use auto, loop or vmap")

    @override
    def forward(self, latents: Tensor) -> Tensor:
        parameters = dict(zip(self._names, self.stacked, strict=True))
        form = self._form
        if form == "auto":
            form = "vmap" if latents.is_cuda else "grouped" if can_group(self._template[0]) else "loop"
        if form == "vmap":
            return vmap(self._generate)(parameters, latents).flatten(0, 1)
        if form == "grouped":
            return _grouped(self._template[0], parameters, latents)
        each = zip(*(parameter.unbind() for parameter in self.stacked), strict=True)
        return torch.cat(
            [self._generate(dict(zip(self._names, own, strict=True)), latents[index]) for index, own in enumerate(each)]
        )

    def _generate(self, parameters: Mapping[str, Tensor], latents: Tensor) -> Tensor:
        images: Tensor = functional_call(self._template[0], dict(parameters), (latents,))
        return images


def can_group(generator: nn.Module) -> bool:
    """Whether generators of this architecture can be the groups of one network."""
    if not isinstance(generator, nn.Sequential) or type(generator).forward is not nn.Sequential.forward:
        return False
    match list(generator):
        case [nn.Linear(), nn.Unflatten(dim=1), *layers]:
            return all(map(_can_group_layer, layers))
    return False


def _can_group_layer(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)
    if isinstance(layer, nn.BatchNorm2d):
        return not layer.track_running_stats
    return isinstance(layer, (nn.Upsample, nn.LeakyReLU, nn.ReLU, nn.Sigmoid, nn.Tanh))


def _grouped(template: nn.Module, parameters: Mapping[str, Tensor], latents: Tensor) -> Tensor:
    """Latents [P, N, Z] to images [P * N, C, H, W]; in between, maps are [N, P * C, H, W]."""
    assert isinstance(template, nn.Sequential)
    groups = len(latents)
    linear, unflatten, *layers = template
    # Weights first, because the gradient of the transposed product would be laid out across the optimiser's state.
    x = (parameters["0.weight"] @ latents.mT).mT
    if linear.bias is not None:
        x = x + parameters["0.bias"].unsqueeze(1)
    x = x.unflatten(2, unflatten.unflattened_size).transpose(0, 1).flatten(1, 2)
    x = x.contiguous(memory_format=torch.channels_last)
    for index, layer in enumerate(layers, start=2):
        own = (f"{index}.weight", f"{index}.bias")
        weight, bias = (parameters[name].flatten(0, 1) if name in parameters else None for name in own)
        if isinstance(layer, nn.Conv2d):
            assert weight is not None
            assert isinstance(layer.padding, tuple), "as can_group has seen"
            x = F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, groups)
        elif isinstance(layer, nn.BatchNorm2d):
            x = F.batch_norm(x, None, None, weight, bias, training=True, eps=layer.eps)
        else:
            x = layer(x)
    images: Tensor = x.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)
    return images
