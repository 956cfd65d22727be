"""Several synthesizers that share the images of each unit, so that a set is diverse by construction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from typing_extensions import override

from raydfkd.data.batches import SyntheticBatch
from raydfkd.seeds import derive_seed
from raydfkd.synthesis.checkpoint import NO_HOOK, InnerHook, StepHook
from raydfkd.synthesis.synthesizer import Log, Synthesizer, num_steps_of
from raydfkd.units import Request


class MixedSynthesizer(Synthesizer):
    """Lets each synthesizer make its share of a request's images of each class, one synthesizer after the other.

    Args:
        parts: shares, in any unit, and synthesizers. The last one makes what rounding leaves, at least an image.
    """

    def __init__(self, parts: Sequence[tuple[float, Synthesizer]]) -> None:
        self._shares = [share for share, _ in parts]
        self._synthesizers = [synthesizer for _, synthesizer in parts]

    @override
    def produce(self, request: Request, log: Log, hook: StepHook = NO_HOOK) -> Iterator[SyntheticBatch]:
        """Stream the images of ``request``, those of one synthesizer before those of the next."""
        saved = hook.resumed()
        first = 0 if saved is None else saved["part"]
        for part, (synthesizer, own) in enumerate(self._requests(request)):
            if part >= first and own.images_per_class:
                inner = InnerHook(hook, partial(_state, part), is_resumed=part == first)
                yield from synthesizer.produce(own, log, inner)

    def num_steps(self, request: Request) -> int:
        """Steps that all of them take."""
        return sum(num_steps_of(*each) for each in self._requests(request))

    def _requests(self, request: Request) -> list[tuple[Synthesizer, Request]]:
        """Each synthesizer and what it is asked for; what it draws differs from what the others draw."""
        total, asked, reached = sum(self._shares), 0, 0.0
        requests = []
        for part, (share, synthesizer) in enumerate(zip(self._shares, self._synthesizers, strict=True)):
            reached += share
            until = round(request.images_per_class * reached / total)
            is_last = part == len(self._shares) - 1
            until = request.images_per_class if is_last else min(until, request.images_per_class - 1)
            own = replace(request, images_per_class=until - asked)
            requests.append((synthesizer, own if is_last else _reseeded(own, part)))
            asked = until
        return requests


def _reseeded(request: Request, part: int) -> Request:
    seeds = [derive_seed(seed, "part", part) for seed in request.class_seeds]
    return replace(request, seed=derive_seed(request.seed, "part", part), class_seeds=seeds)


def _state(part: int) -> dict[str, Any]:
    return {"part": part}
