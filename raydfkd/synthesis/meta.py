"""Meta-learned weights: those from which few steps make a good batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from raydfkd.config.schema import PositiveFloat, Spec


class MetaSpec(Spec):
    """Weights that every batch's training begins with, learned over the batches."""

    lr: PositiveFloat
    """Adam's learning rate of these weights, a step a batch."""
    kind: Literal["fomaml", "reptile"] = "fomaml"
    """`fomaml` steps along the sum of the gradients that the batch's steps met; `reptile` towards where they led."""


class MetaWeights:
    """The weights that a batch begins with, as meta-learned over the batches before it (Fang et al. 2022, FastDFKD).

    The released code multiplies Reptile's gradient by 67, and FOMAML's rate by the number of steps; Adam divides by a
    gradient's own size, so here there is no such factor.

    Args:
        weights: those that are trained on a batch, in place.
        spec: how the weights to begin with are learned.
    """

    def __init__(self, weights: Sequence[Tensor], spec: MetaSpec) -> None:
        self._weights = weights
        self._is_reptile = spec.kind == "reptile"
        self._meta = [tensor.detach().clone().requires_grad_() for tensor in weights]
        self._sums = [torch.zeros_like(tensor) for tensor in self._meta]
        self._optimizer = torch.optim.Adam(self._meta, lr=spec.lr, betas=(0.5, 0.999))

    def note_gradients(self) -> None:
        """A step is about to be made with the gradients that the weights hold."""
        if not self._is_reptile:
            for total, tensor in zip(self._sums, self._weights, strict=True):
                if tensor.grad is not None:
                    total.add_(tensor.grad)

    @torch.no_grad()
    def learn(self) -> None:
        """Learn from the steps since the last call, and put the weights to begin with in the place of those trained."""
        for meta, total, tensor in zip(self._meta, self._sums, self._weights, strict=True):
            meta.grad = meta - tensor if self._is_reptile else total.clone()
            total.zero_()
        self._optimizer.step()
        for meta, tensor in zip(self._meta, self._weights, strict=True):
            tensor.copy_(meta)

    def state_dict(self) -> dict[str, Any]:
        """What a training resumes from."""
        return {
            "meta": [tensor.detach() for tensor in self._meta],
            "sums": list(self._sums),
            "optimizer": self._optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from ``state``."""
        for own, saved in zip([*self._meta, *self._sums], [*state["meta"], *state["sums"]], strict=True):
            own.copy_(saved)
        self._optimizer.load_state_dict(state["optimizer"])
