"""The interface of synthesizers, and what the engine supplies to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from raydfkd.config.registry import Registry
from raydfkd.config.schema import ImageSpace
from raydfkd.data.batches import SyntheticBatch
from raydfkd.images.augment import Chain
from raydfkd.losses.objective import ObjectiveValue
from raydfkd.networks.observed import Need
from raydfkd.synthesis.checkpoint import StepHook
from raydfkd.synthesis.judge import Judge, ObjectiveNotFiniteError
from raydfkd.synthesis.start import PictureStart
from raydfkd.synthesis.targets import TargetSampler
from raydfkd.units import Request

LOG_EVERY = 50
"""Steps between looks at the objective's value; each one waits for the device."""
Log = Callable[[Mapping[str, float]], None]
"""Receives the step and the objective's parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Everything that the engine supplies to a synthesizer."""

    judge: Judge
    space: ImageSpace
    classes: int
    """Classes of the teacher."""
    targets: TargetSampler
    augment: Chain
    device: torch.device
    start: PictureStart | None = None
    """Real pictures to begin with instead of noise; for those that say ``starts_from_pictures``."""
    embeddings: Tensor | None = None
    """A vector of each class [K, D], which tells a conditional generator more than a number does."""

    def seen(
        self, images: Tensor, targets: Tensor | None, rng: torch.Generator, *, augment: Chain, progress: float
    ) -> tuple[Tensor, Tensor | None]:
        """Images as the teacher sees them through ``augment``, with their targets, which are mixed as they are."""
        if targets is None:
            return augment(images, rng, progress=progress), None
        return augment.with_labels(images, targets, rng, classes=self.classes, progress=progress)

    def groups(self, request: Request) -> int:
        """Equal, contiguous parts of a batch for ``request``: one a class, where images have a class."""
        return len(request.classes) if self.targets.is_conditional else 1


class Synthesizer(Protocol):
    """Makes the images of a request. The result depends on the request and the recipe alone.

    Its class may say in ``offers`` (a set of ``Need``) what it gives to terms beside images, such as latents, and with
    ``starts_from_pictures = True`` that it begins with those of ``Setting.start`` where there are some. One that
    has a ``training(request, *, steps, parallel, rank)`` can feed a student online, see ``GeneratorTraining``. One that
    has a ``num_steps(request)``, the steps that it will announce to the hook, can be shown with the share that is made.
    """

    def produce(self, request: Request, log: Log, hook: StepHook = ...) -> Iterator[SyntheticBatch]:
        """Stream the images of ``request``, with a ``hook`` between any two steps; memory stays bounded.

        One that goes on from a state of another process streams the images that are still missing, the same ones.

        Raises:
            ObjectiveNotFiniteError: the unit has failed.
            Interrupted: by the hook.
        """


SYNTHESIZERS: Registry[Synthesizer] = Registry(
    "synthesizer",
    ["raydfkd.synthesis.pixels", "raydfkd.synthesis.generator", "raydfkd.synthesis.drawn"],
    member="produce",
)


def offers_of(synthesizer: str, *, where: str) -> frozenset[Need]:
    """Needs of terms that the synthesizer called so says it meets."""
    offers: frozenset[Need] = getattr(SYNTHESIZERS.get(synthesizer, where=where), "offers", frozenset())
    return offers


def starts_from_pictures(synthesizer: str, *, where: str) -> bool:
    """Whether the synthesizer called so says that it begins with images, which may be real ones."""
    return bool(getattr(SYNTHESIZERS.get(synthesizer, where=where), "starts_from_pictures", False))


def is_optimised(synthesizer: str, *, where: str) -> bool:
    """Whether the synthesizer called so minimises an objective, as all do that do not say ``is_optimised = False``."""
    return bool(getattr(SYNTHESIZERS.get(synthesizer, where=where), "is_optimised", True))


def num_steps_of(synthesizer: Synthesizer, request: Request) -> int:
    """Steps that the images of ``request`` take, as the synthesizer says; 0 where it does not."""
    num_steps: Callable[[Request], int] = getattr(synthesizer, "num_steps", lambda _: 0)
    return num_steps(request)


def not_offered(synthesizer: str, need: Need) -> str:
    """Says of a ``need`` that the synthesizer does not meet it, and which ones do."""
    others = [name for name in SYNTHESIZERS.names() if need in offers_of(name, where=name)]
    return f"which {synthesizer} does not offer; synthesizers that do: {', '.join(others) or 'none of ours'}"


class Progress:
    """Watches the objective over the steps of one optimisation without waiting for the device at each of them."""

    def __init__(self, log: Log, *, steps: int) -> None:
        self._log = log
        self._steps = steps

    def __call__(self, step: int, value: ObjectiveValue) -> None:
        """Log the value of ``step`` (from 1) where it is due. Raises ObjectiveNotFiniteError."""
        if step % LOG_EVERY and step not in (self._steps, 1):
            return
        entry: dict[str, Any] = {"step": step, "total": value.total.detach().item()}
        entry |= {name: part.item() for name, part in value.parts.items()}
        wrong = [name for name, number in entry.items() if not math.isfinite(number)]
        if wrong:
            raise ObjectiveNotFiniteError(f"objective is {entry['total']} at step {step} ({', '.join(wrong)})")
        self._log(entry)
