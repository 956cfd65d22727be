"""Where images meet teacher, student and objective, and what every synthesizer is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from raydfkd.batches import SyntheticBatch
from raydfkd.images import PixelRange
from raydfkd.losses.objective import Objective, ObjectiveValue, View
from raydfkd.observed import Need, Observation, ObservedNetwork
from raydfkd.registry import Registry
from raydfkd.schedule import Request
from raydfkd.sections import ImageSpace
from raydfkd.synthesis.augment import Augmentation
from raydfkd.synthesis.interlude import Interlude
from raydfkd.synthesis.targets import TargetSampler

LOG_EVERY = 50
"""Steps between looks at the objective's value; each one waits for the device."""

Log = Callable[[Mapping[str, float]], None]
"""Receives the step and the objective's parts."""


class StudentFeed(Protocol):
    """The student inside the objective: the live object of this process or a published one."""

    @property
    def version(self) -> int:
        """Number of the version in use, which is recorded beside every image; -1 for one that nobody has published."""

    def refresh(self) -> int:
        """Take the newest version; returns its number."""

    def __call__(self, images: Tensor) -> Observation | None:
        """What the student says of ``images``; None while there is none to challenge."""


class ObjectiveNotFiniteError(ArithmeticError):
    """The objective became NaN or infinite; the unit has failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """The only place where images meet teacher, student and objective."""

    teacher: ObservedNetwork
    objective: Objective
    pixels: PixelRange
    student: StudentFeed | None = None

    def __call__(
        self, images: Tensor, targets: Tensor | None, latents: Tensor | None = None, *, groups: int = 1
    ) -> tuple[View, ObjectiveValue]:
        """Evaluate the objective on normalised ``images`` that hold ``groups`` classes one after another."""
        by_class = Need.CLASS_MOMENTS in self.objective.needs

        def observe(batch: Tensor) -> Observation:
            return self.teacher(batch, groups=groups if by_class else 1)

        view = View(
            images=images,
            targets=targets,
            teacher=observe(images),
            observe=observe,
            student=self.student(images) if self.student is not None else None,
            latents=latents,
        )
        return view, self.objective(view)

    @torch.no_grad()
    def keep(self, images: Tensor, targets: Tensor | None, objective: float) -> SyntheticBatch:
        """Turn normalised ``images`` into stored pixels and ask the teacher about exactly those."""
        stored = self.pixels.to_uint8(images)
        logits = self.teacher(self.pixels.from_uint8(stored)).logits
        labels = targets if targets is not None and targets.ndim == 1 else logits.argmax(1)
        return SyntheticBatch(
            images=stored.cpu(),
            labels=labels.long().cpu().clone(),
            teacher_logits=logits.half().cpu(),
            objective=objective,
            student_version=-1 if self.student is None else self.student.version,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the engine supplies to a synthesizer."""

    judge: Judge
    space: ImageSpace
    targets: TargetSampler
    augment: Augmentation
    device: torch.device


class Synthesizer(Protocol):
    """Makes the images of a request. The result depends on the request and the recipe alone."""

    def produce(self, request: Request, log: Log, interlude: Interlude = ...) -> Iterator[SyntheticBatch]:
        """Stream the images of ``request``, with an ``interlude`` between any two steps; memory stays bounded.

        One that goes on from a state of another process streams the images that are still missing, the same ones.

        Raises:
            ObjectiveNotFiniteError: the unit has failed.
            Interrupted: by the interlude.
        """


SYNTHESIZERS: Registry[Synthesizer] = Registry(
    "synthesizer", ["raydfkd.synthesis.pixels", "raydfkd.synthesis.generator"]
)


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


def warmup_cosine(step: int, *, steps: int, warmup: int) -> float:
    """Factor on the learning rate at ``step`` (from 0): linear warm-up, then half a cosine to zero (Yin et al.)."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def rng_from(seed: int) -> torch.Generator:
    """A CPU generator of random numbers, so that a seed means the same on every device."""
    return torch.Generator().manual_seed(seed)


def rng_at(state: Tensor) -> torch.Generator:
    """A CPU generator that goes on from ``state``."""
    rng = torch.Generator()
    rng.set_state(state)
    return rng
