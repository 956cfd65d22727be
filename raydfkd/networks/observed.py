"""A network plus what the objective needs to see of its inside."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raydfkd.errors import RecipeError
from raydfkd.networks.batchnorm import LayerMoments, ObservedBatchNorm, observe_batchnorm
from raydfkd.networks.input_gradients import FastInputGradients

logger = logging.getLogger(__name__)


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

    ``compiled`` makes one graph of the network and its taps wherever gradients are wanted, anew for each shape of
    images and number of groups; where that fails it is logged once and the network goes on uncompiled.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        taps: frozenset[Need] = frozenset(),
        frozen: bool,
        batchnorm: Literal["running", "batch"] = "running",
        precision: torch.dtype = torch.float32,
        compiled: bool = False,
    ) -> None:
        self._module = copy.deepcopy(module).eval().requires_grad_(False) if frozen else module
        self._is_frozen = frozen
        self._batchnorm = batchnorm
        self._precision = precision
        self._observed: list[ObservedBatchNorm] = []
        self._features: list[Tensor] = []
        wants_moments = bool(taps & {Need.MOMENTS, Need.CLASS_MOMENTS})
        assert frozen or not wants_moments, "moments are taken of a frozen network"
        if wants_moments:
            self._module = observe_batchnorm(self._module, self._observed)
        if frozen:
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
        self._compiled: Callable[[Tensor], Any] | None = None
        if compiled:
            self._compiled = torch.compile(self._module, fullgraph=True, dynamic=False)

    def to(self, device: torch.device) -> ObservedNetwork:
        """Move to ``device``, in place; one without bfloat16 computes in float32 instead."""
        self._module.to(device)
        if self._precision == torch.bfloat16 and not _has_bfloat16(device):
            logger.warning("%s has no bfloat16; computing in float32", device)
            self._precision = torch.float32
        return self

    def __call__(self, images: Tensor, *, groups: int = 1) -> Observation:
        """Observe ``images`` [N, C, H, W]; moments are taken over ``groups`` equal, contiguous parts of the batch."""
        device = images.device.type
        gradients = FastInputGradients() if self._is_frozen and device == "cpu" else nullcontext()
        with self._batchnorm_mode(), gradients, self.precision(device):
            logits, trace = self._run(images, groups)
        return Observation(
            logits=logits.float(),
            features=self._features[-1].flatten(1).float() if self._features else None,
            moments=tuple(trace),
        )

    def precision(self, device: str) -> torch.autocast:
        """The arithmetic that the network computes in on ``device``, for what computes along with it."""
        return torch.autocast(device, self._precision, self._precision != torch.float32)

    def _run(self, images: Tensor, groups: int) -> tuple[Tensor, list[LayerMoments]]:
        if self._compiled is not None and torch.is_grad_enabled():
            try:
                return self._trace(self._compiled, images, groups)
            except torch._dynamo.exc.TorchDynamoException as error:
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                logger.warning("the teacher cannot be compiled (%s); going on without", reason)
                self._compiled = None
        return self._trace(self._module, images, groups)

    def _trace(
        self, network: Callable[[Tensor], Any], images: Tensor, groups: int
    ) -> tuple[Tensor, list[LayerMoments]]:
        trace: list[LayerMoments] = []
        for layer in self._observed:
            layer.groups, layer.trace = groups, trace
        self._features.clear()
        return network(images), trace

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


def _has_bfloat16(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
