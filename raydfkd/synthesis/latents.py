"""Latents of a batch: what generators are given for each image, drawn, trained, or made of class embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override


class Latents(Protocol):
    """Latents [P, N, width] of the next batch, for P generators of N images each."""

    width: int
    """Numbers that a generator is given for an image."""

    @property
    def trained(self) -> Sequence[Tensor]:
        """The tensors that are trained along with the generators."""

    def renew(self) -> None:
        """Draw what is trained anew, for another batch."""

    def __call__(self) -> Tensor:
        """The latents of a step."""

    def state_dict(self) -> Mapping[str, Any]:
        """What a training resumes from, random numbers aside."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from ``state``."""


class DrawnLatents(Latents):
    """Standard normal numbers, drawn anew for each step; each generator's from its own source.

    Args:
        rngs: one source of random numbers for each of the P generators.
        count: N, images of a batch of one generator.
        latent: numbers that are drawn for an image.
        codes: [N, D], put beside them: what tells a conditional generator the class; None for none.
        device: of the latents.
    """

    def __init__(
        self, rngs: Sequence[torch.Generator], *, count: int, latent: int, codes: Tensor | None, device: torch.device
    ) -> None:
        self._rngs, self._count, self._latent = rngs, count, latent
        self._codes = None if codes is None else codes.unsqueeze(0).to(device)
        self._device = device
        self.width = latent + (0 if codes is None else codes.shape[1])

    @property
    @override
    def trained(self) -> Sequence[Tensor]:
        return ()

    @override
    def renew(self) -> None:
        return

    @override
    def __call__(self) -> Tensor:
        return self._beside_codes(self._noise())

    @override
    def state_dict(self) -> Mapping[str, Any]:
        return {}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return

    def _noise(self) -> Tensor:
        drawn = [torch.randn(self._count, self._latent, generator=rng) for rng in self._rngs]
        return torch.stack(drawn).to(self._device)

    def _beside_codes(self, latents: Tensor) -> Tensor:
        return latents if self._codes is None else torch.cat([latents, self._codes], 2)


class TrainedLatents(DrawnLatents):
    """The same numbers at every step of a batch, trained with the generators (Fang et al. 2021, CMI)."""

    def __init__(
        self, rngs: Sequence[torch.Generator], *, count: int, latent: int, codes: Tensor | None, device: torch.device
    ) -> None:
        super().__init__(rngs, count=count, latent=latent, codes=codes, device=device)
        self._vectors = torch.empty(0)

    @property
    @override
    def trained(self) -> Sequence[Tensor]:
        return (self._vectors,)

    @override
    def renew(self) -> None:
        self._vectors = self._noise().requires_grad_()

    @override
    def __call__(self) -> Tensor:
        return self._beside_codes(self._vectors)

    @override
    def state_dict(self) -> Mapping[str, Any]:
        return {"vectors": self._vectors.detach()}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self._vectors.copy_(state["vectors"])


class NoisyLayers(Latents):
    """Class embeddings through linear layers that are drawn anew for each batch and trained with the generator.

    The randomness of an image lies in its layer, and what its class is in the embedding, which is standardised over the
    classes. There are as many layers as images of a class, each of which makes one image of every class. Source: Tran
    et al. 2024 (NAYER), whose layers are wider and of unit variance, where here an image's latents are. With one-hot
    codes an image's latents are a row of its own, so this is ``TrainedLatents`` then, and tells nothing of the class.

    Args:
        rng: of the layers.
        codes: [N, D], the embedding of each image's class, class by class.
        classes: number of classes; N is a multiple of it.
        latent: numbers that a layer makes of an embedding.
        device: of the latents.
    """

    def __init__(self, rng: torch.Generator, *, codes: Tensor, classes: int, latent: int, device: torch.device) -> None:
        by_class = codes.unflatten(0, (classes, -1))[:, 0]
        if classes > 1:
            by_class = (by_class - by_class.mean(0)) / by_class.std(0, correction=0).clamp_min(1e-6)
        self._codes = by_class.to(device)
        self._layers = torch.empty(0)
        self._rng, self._count, self._device = rng, len(codes) // classes, device
        self.width = latent

    @property
    @override
    def trained(self) -> Sequence[Tensor]:
        return (self._layers,)

    @override
    def renew(self) -> None:
        inputs = self._codes.shape[1]
        layers = torch.randn(self._count, inputs, self.width, generator=self._rng) / math.sqrt(inputs)
        self._layers = layers.to(self._device).requires_grad_()

    @override
    def __call__(self) -> Tensor:
        return torch.einsum("kd,ndz->knz", self._codes, self._layers).flatten(0, 1).unsqueeze(0)

    @override
    def state_dict(self) -> Mapping[str, Any]:
        return {"layers": self._layers.detach()}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self._layers.copy_(state["layers"])
