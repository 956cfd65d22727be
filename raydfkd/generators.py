"""Generators: latents to images; and many of them as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from raydfkd.recipe import Count, ImageSpace, Positive
from raydfkd.registry import Registry

GENERATORS: Registry[nn.Module] = Registry("generator", [])


@GENERATORS.register("conv")
class ConvGenerator(nn.Module):
    """Linear layer to a small map, then doublings (nearest neighbour) with 3x3 convolutions; sigmoid.

    BatchNorm always uses the batch at hand, so the module has no state but its weights. Modelled on the generator
    of Chen et al. 2019 (DAFL), narrower, with ordinary BatchNorm eps.

    Args:
        latent: size of the latent vector.
        width: channels of the first map; halved after the second doubling and from there on.
        doublings: times the image grows by two; the image size must be divisible by 2 to this power.
    """

    def __init__(self, space: ImageSpace, *, latent: Positive = 32, width: Positive = 16, doublings: Count = 2) -> None:
        super().__init__()
        if space.size % (1 << doublings):
            raise ValueError(
                f"doublings is {doublings}, but image size {space.size} is not divisible by {1 << doublings}"
            )
        self.latent = latent
        self._start = (width, space.size >> doublings, space.size >> doublings)
        self.project = nn.Linear(latent, width * self._start[1] ** 2)
        layers: list[nn.Module] = [_norm_relu(width)]
        inputs = width
        for doubling in range(doublings):
            outputs = max(width >> doubling, 4)
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)]
            layers += [_norm_relu(outputs)]
            inputs = outputs
        self.body = nn.Sequential(*layers, nn.Conv2d(inputs, space.channels, 3, padding=1), nn.Sigmoid())

    def forward(self, latents: Tensor) -> Tensor:
        """Latents [N, Z] to images [N, C, H, W] in [0, 1]."""
        images: Tensor = self.body(self.project(latents).unflatten(1, self._start))
        return images


def _norm_relu(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels, track_running_stats=False), nn.LeakyReLU(0.2))


StackForm = Literal["auto", "loop", "vmap"]


class StackedGenerators(nn.Module):
    """P generators of one architecture as one module: parameters [P, ...], latents [P, N, Z] to [P * N, C, H, W].

    ``loop`` runs them one after another, ``vmap`` together; the images are the same to rounding. On CPU the loop is
    faster (its convolutions stay in cache), on a GPU, where one small generator leaves the device idle, the other:
    ``auto`` decides by the device. One optimiser step over the stacked parameters serves all P either way.
    """

    def __init__(self, generators: Sequence[nn.Module], *, form: StackForm = "auto") -> None:
        super().__init__()
        parameters, buffers = stack_module_state(list(generators))
        assert not buffers, "a stacked generator holds no state but its weights"
        self._names = tuple(parameters)
        self.stacked = nn.ParameterList([nn.Parameter(parameters[name].detach()) for name in self._names])
        self._form = form
        self._template = (generators[0],)  # in a tuple, so that its weights are not registered as ours

    def forward(self, latents: Tensor) -> Tensor:
        """See the class."""
        form = self._form
        if form == "auto":
            form = "vmap" if latents.is_cuda else "loop"
        if form == "vmap":
            return vmap(self._generate)(dict(zip(self._names, self.stacked, strict=True)), latents).flatten(0, 1)
        each = zip(*(parameter.unbind() for parameter in self.stacked), strict=True)
        return torch.cat(
            [
                self._generate(dict(zip(self._names, parameters, strict=True)), latents[index])
                for index, parameters in enumerate(each)
            ]
        )

    def _generate(self, parameters: Mapping[str, Tensor], latents: Tensor) -> Tensor:
        images: Tensor = functional_call(self._template[0], dict(parameters), (latents,))
        return images
