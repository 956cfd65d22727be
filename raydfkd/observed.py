"""A network plus what the objective needs to see of its inside."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch
from torch import Tensor, nn

from raydfkd.frozen import LayerMoments, ObservedBatchNorm, specialize
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
class Observation:
    """What a network says of a batch of N images."""

    logits: Tensor
    """[N, K]."""
    features: Tensor | None = None
    """[N, D]."""
    moments: tuple[LayerMoments, ...] = ()
    """One entry a BatchNorm layer, in the order in which the forward pass meets them."""


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
        self._observed: list[ObservedBatchNorm] = []
        self._features: list[Tensor] = []
        wants_moments = bool(taps & {Need.MOMENTS, Need.CLASS_MOMENTS})
        assert frozen or not wants_moments, "moments are taken of a frozen network"
        if frozen:
            self._module = specialize(self._module, moments=self._observed if wants_moments else None)
            self._module.to(memory_format=torch.channels_last)
        if wants_moments and not self._observed:
            raise RecipeError(
                "synthesis.objective has bn_moments, but the teacher has no BatchNorm layer to match; drop the term"
            )
        if Need.FEATURES in taps:
            last = [layer for layer in self._module.modules() if isinstance(layer, nn.Linear)]
            if not last:
                raise RecipeError(
                    "synthesis.objective has activation, but the teacher has no final linear layer; drop the term"
                )
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
