"""Selection between synthesizer and set: more images are made than are wanted, and the better ones are kept."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from raydfkd.config.registry import Registry
from raydfkd.config.schema import SelectSpec
from raydfkd.data.batches import SyntheticBatch
from raydfkd.seeds import derive_seed, rng_from
from raydfkd.synthesis.checkpoint import NO_HOOK, InnerHook, StepHook
from raydfkd.synthesis.synthesizer import Log, Synthesizer, num_steps_of
from raydfkd.units import Request

ROUNDS_OF_EM = 100


class Selector(Protocol):
    """Says of images that were made together which ones are worth keeping."""

    def scores(self, logits: Tensor, labels: Tensor, rng: torch.Generator) -> Tensor:
        """Scores [N] of images with the teacher's logits [N, K] and labels [N]; the highest of a class are kept.

        Of equal scores the earlier ones are kept. What is drawn is drawn from ``rng``.
        """


SELECTORS: Registry[Selector] = Registry("selector", [], member="scores")


@SELECTORS.register("clean_confidence")
class CleanConfidence(Selector):
    """Keeps the images of which a mixture of two normal distributions says that the teacher is sure enough.

    The mixture is fitted to the teacher's confidence in its answer, the largest probability, over the images that are
    judged together; the score is the posterior probability of the component with the higher mean, which is taken for
    the clean one. Source: TA-DFKD (AAAI 2024). Unlike there, each class keeps exactly as many images as the unit wants
    of it, whatever share of them is clean, and images are selected once, before they are stored.
    """

    @override
    def scores(self, logits: Tensor, labels: Tensor, rng: torch.Generator) -> Tensor:
        return posterior_of_the_higher(logits.double().softmax(1).amax(1))


@SELECTORS.register("balanced_confidence")
class BalancedConfidence(Selector):
    """Keeps images at random, likelier the surer the teacher is of them and the rarer what it sees in them.

    An image with probabilities p weighs max(p)^2 times the sum of p_k over the mean of p_k over all images that are
    judged together, and images are drawn without replacement by these weights (Efraimidis & Spirakis 2006). For images
    that nobody asked a class of, which are of few classes mostly.
    """

    @override
    def scores(self, logits: Tensor, labels: Tensor, rng: torch.Generator) -> Tensor:
        probabilities = logits.double().softmax(1)
        rarity = (probabilities / probabilities.mean(0).clamp_min(1e-4)).sum(1)
        weights = rarity * probabilities.amax(1).square()
        return torch.rand(len(labels), generator=rng, dtype=torch.float64).log() / weights


@SELECTORS.register("random")
class AtRandom(Selector):
    """Keeps images at random: the control that shows what a selector's choice is worth."""

    @override
    def scores(self, logits: Tensor, labels: Tensor, rng: torch.Generator) -> Tensor:
        return torch.rand(len(labels), generator=rng)


def posterior_of_the_higher(values: Tensor) -> Tensor:
    """Posterior probabilities [N] of the component with the higher mean, of a two-component mixture fitted to N values.

    Expectation maximisation in float64, from the least and the largest value as means, equal weights and the variance
    of all; a component's variance stays above a thousandth of it. Where all values are the same, so is the answer.
    """
    spread = values.var(correction=0)
    if len(values) < 2 or spread == 0:
        return torch.ones_like(values)
    means, variances = torch.stack([values.min(), values.max()]), spread.repeat(2)
    shares = torch.full_like(means, 0.5)
    posteriors = torch.empty(0)
    for _ in range(ROUNDS_OF_EM):
        distances = (values[:, None] - means).square() / variances
        posteriors = (shares.log() - 0.5 * (variances.log() + distances)).softmax(1)
        counts = posteriors.sum(0).clamp_min(1e-12)
        means = posteriors.T @ values / counts
        variances = (posteriors * (values[:, None] - means).square()).sum(0) / counts
        variances = variances.clamp_min(1e-3 * spread)
        shares = counts / len(values)
    return posteriors[:, means.argmax()]


class SelectingSynthesizer(Synthesizer):
    """Makes ``candidates`` times the images of a request and keeps of each class as many as are wanted, the best ones.

    Images are judged in pools of at least ``judged_at_once``, which are all that is held. The share of a class's images
    that is kept is the same in every pool but for rounding. Without targets, all images of a unit count as one class.

    Terms of the objective that remember what was kept are told of all candidates.

    Args:
        synthesizer: makes the candidates.
        selector: scores them.
        spec: how many are made and judged together.
        is_conditional: whether images are made for a class each.
    """

    def __init__(self, synthesizer: Synthesizer, selector: Selector, spec: SelectSpec, *, is_conditional: bool) -> None:
        self._synthesizer, self._selector, self._spec = synthesizer, selector, spec
        self._is_conditional = is_conditional

    @override
    def produce(self, request: Request, log: Log, hook: StepHook = NO_HOOK) -> Iterator[SyntheticBatch]:
        candidates = self._candidates(request)
        pool = _Pool(self._selector, request, candidates, is_conditional=self._is_conditional)
        saved = hook.resumed()
        if saved is not None:
            pool.load_state_dict(saved["selection"])
        inner = InnerHook(hook, lambda: {"selection": pool.state_dict()})
        for batch in self._synthesizer.produce(candidates, log, inner):
            pool.add(batch)
            if len(pool) >= self._spec.judged_at_once:
                yield from pool.drained()
        yield from pool.drained()
        assert pool.is_complete, "a synthesizer makes as many images of each class as it is asked for"

    def num_steps(self, request: Request) -> int:
        """Steps that the candidates take."""
        return num_steps_of(self._synthesizer, self._candidates(request))

    def _candidates(self, request: Request) -> Request:
        count = math.ceil(round(self._spec.candidates * request.images_per_class, 6))  # 1.1 * 10 is a little above 11
        return replace(request, images_per_class=count)


class _Pool:
    """Candidates that wait for their selection, and how many of each class were seen and kept."""

    def __init__(self, selector: Selector, wanted: Request, candidates: Request, *, is_conditional: bool) -> None:
        self._selector = selector
        self._is_conditional = is_conditional
        self._groups = len(wanted.classes) if is_conditional else 1
        self._wanted, self._made = wanted.count // self._groups, candidates.count // self._groups
        self._seed = wanted.class_seeds[0]
        self._waiting: list[SyntheticBatch] = []
        self._seen: Counter[int] = Counter()
        self._num_drained = 0

    def __len__(self) -> int:
        return sum(map(len, self._waiting))

    @property
    def is_complete(self) -> bool:
        """Whether as many of each class were kept as are wanted."""
        return len(self._seen) == self._groups and set(self._seen.values()) == {self._made}

    def add(self, batch: SyntheticBatch) -> None:
        """Let a batch of candidates wait."""
        self._waiting.append(batch)

    def drained(self) -> list[SyntheticBatch]:
        """Select among the candidates that wait; returns what is kept of each of their batches that has any."""
        batches, self._waiting = self._waiting, []
        if not batches:
            return []
        labels = torch.cat([batch.labels for batch in batches])
        logits = torch.cat([batch.teacher_logits for batch in batches]).float()
        rng = rng_from(derive_seed(self._seed, "select", self._num_drained))
        self._num_drained += 1
        is_kept = self._best(self._selector.scores(logits, labels, rng), labels)
        parts = zip(batches, is_kept.split([len(batch) for batch in batches]), strict=True)
        return [batch.rows(rows) for batch, rows in parts if rows.any()]

    def _best(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Whether each image is kept, [N]."""
        group_of = labels if self._is_conditional else torch.zeros_like(labels)
        is_kept = torch.zeros(len(labels), dtype=torch.bool)
        for group in group_of.unique().tolist():
            rows = (group_of == group).nonzero().flatten()
            due = self._due(group)
            self._seen[group] += len(rows)
            best = scores[rows].argsort(descending=True, stable=True)
            is_kept[rows[best[: self._due(group) - due]]] = True
        return is_kept

    def _due(self, group: int) -> int:
        """Images of a class that are kept by the time that so many of its candidates were seen."""
        return self._seen[group] * self._wanted // self._made

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on from, as tensors and plain data."""
        return {
            "waiting": [batch.state_dict() for batch in self._waiting],
            "seen": dict(self._seen),
            "num_drained": self._num_drained,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self._waiting = [SyntheticBatch(**batch) for batch in state["waiting"]]
        self._seen = Counter(state["seen"])
        self._num_drained = state["num_drained"]
