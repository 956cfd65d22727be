"""A term about another term: how much it has grown."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from raydfkd.config.schema import LossTerm, Positive, PositiveFloat
from raydfkd.errors import RecipeError
from raydfkd.losses.objective import TERMS, Term, View
from raydfkd.networks.observed import Tap


@TERMS.register("exponential_increment")
class ExponentialIncrement(Term):
    """Exponential of what another term has grown by: a rise weighs more and more, a fall fades.

    ``exp(value - reference)`` has no unit, so that several such terms need no weights; in (0, inf). The reference is 0
    in the first step, and from then on the value of the first step and of every ``refresh``-th one after it; no
    gradient flows through it. Source: Han et al. 2021 (RDSKD), where it is that of each epoch's second step. Beyond
    ``limit`` the exponential goes on as its tangent, so that it neither overflows nor loses its gradient.

    Args:
        of: the term, with its options: one_hot, or {kind: cross_entropy, temperature: 2}.
        refresh: steps for which a reference holds.
        limit: greatest exponent.
    """

    is_per_image = False

    reference: Tensor
    step: Tensor

    def __init__(self, *, of: LossTerm, refresh: Positive = 50, limit: PositiveFloat = 10.0) -> None:
        super().__init__()
        try:
            self.of = TERMS.build(of.kind, of.options, where="of")
        except RecipeError as error:
            raise ValueError(str(error)) from error  # so that the key in front of it is put there by who knows it
        self.needs_targets = self.of.needs_targets
        self._refresh = refresh
        self._limit = limit
        self.register_buffer("reference", torch.zeros(()))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def taps(self) -> frozenset[Tap]:
        """Those of the term inside."""
        return self.of.taps

    @property
    @override
    def remembers(self) -> bool:
        return self.of.remembers

    @override
    def forward(self, view: View) -> Tensor:
        value: Tensor = self.of(view)
        increment = value - self.reference
        capped = increment.clamp(max=self._limit)
        self.reference = torch.where(self.step % self._refresh == 0, value.detach(), self.reference)
        self.step = self.step + 1
        return capped.exp() * (1 + increment - capped)

    @override
    def commit(self, view: View) -> None:
        self.of.commit(view)
