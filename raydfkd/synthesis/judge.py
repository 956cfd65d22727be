"""The only place where images meet teacher, student and objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from raydfkd.data.batches import SyntheticBatch
from raydfkd.images.pixels import PixelRange, nominal_from_uint8, nominal_to_uint8
from raydfkd.losses.objective import Objective, ObjectiveValue, View
from raydfkd.networks.batchnorm import LayerMoments
from raydfkd.networks.observed import Need, Observation, ObservedNetwork

AskStudent = Callable[[Tensor], Observation | None]
"""Answers of a student to images in the teacher's units; None while there is none to challenge."""


class StudentFeed(Protocol):
    """The student inside the objective: the live object of this process or a published one."""

    @property
    def version(self) -> int:
        """Number of the version in use, which is recorded beside every image; -1 for one that nobody has published."""

    def __call__(self, images: Tensor) -> Observation | None:
        """The student's answer to ``images``; None while there is none to challenge."""


class ObjectiveNotFiniteError(ArithmeticError):
    """The objective became NaN or infinite; the unit has failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """The only place where images meet teacher, student and objective."""

    teacher: ObservedNetwork
    objective: Objective
    pixels: PixelRange
    student: StudentFeed | None = None
    class_statistics: Sequence[LayerMoments] = ()
    """Moments of each class, where pictures of each were measured; see ``View``."""

    def __call__(
        self,
        images: Tensor,
        targets: Tensor | None,
        latents: Tensor | None = None,
        *,
        groups: int = 1,
        progress: float = 1.0,
        student: AskStudent | None = None,
    ) -> tuple[View, ObjectiveValue]:
        """Evaluate the objective on nominal ``images`` that hold ``groups`` classes one after another.

        ``progress`` is the share of the steps that are made. Terms that ask the student ask ``student``, the judge's
        own unless given.
        """
        ask = self.asked(student)

        def ask_teacher(batch: Tensor) -> Observation:
            return self.teacher(batch, groups=self._parts(len(batch), groups))

        seen = self.pixels.from_nominal(images)

        view = View(
            images=images,
            targets=targets,
            teacher=ask_teacher(seen),
            observe=lambda batch: ask_teacher(self.pixels.from_nominal(batch)),
            student=None if ask is None else ask(seen),
            latents=latents,
            seen=seen,
            groups=groups,
            class_statistics=self.class_statistics,
            progress=progress,
            compiled=self.teacher.is_compiled,
        )
        return view, self.objective(view)

    def asked(self, student: AskStudent | None = None) -> AskStudent | None:
        """The student that terms ask, the judge's own unless given; None where no term does."""
        return (student or self.student) if Need.STUDENT in self.objective.needs else None

    def _parts(self, images: int, classes: int) -> int:
        """Parts of a batch of each of which moments are taken: the smallest that a term asks for."""
        if Need.IMAGE_MOMENTS in self.objective.needs:
            return images
        return classes if Need.CLASS_MOMENTS in self.objective.needs else 1

    @torch.no_grad()
    def keep(
        self,
        images: Tensor,
        targets: Tensor | None,
        objective: float,
        *,
        latents: Tensor | None = None,
        student: AskStudent | None = None,
    ) -> SyntheticBatch:
        """Turn nominal ``images`` into stored pixels, ask the teacher about exactly those and tell the terms of them.

        Raises:
            ObjectiveNotFiniteError: an image or the teacher's answer to it is not finite, as after a last step whose
                value nobody has seen; stored, it would be black.
        """
        stored = nominal_to_uint8(images)
        seen = self.pixels.from_uint8(stored)
        teacher = self.teacher(seen)
        logits = teacher.logits.half()
        wrong = ~(images.flatten(1).isfinite().all(1) & logits.isfinite().all(1))
        if wrong.any():
            count = f"{int(wrong.sum())} of {len(images)} images"
            raise ObjectiveNotFiniteError(f"{count}, or the teacher's answers to them, are not finite in the end")
        if self.objective.remembers:
            ask = self.asked(student)
            view = View(
                images=nominal_from_uint8(stored),
                targets=targets,
                teacher=teacher,
                observe=lambda batch: self.teacher(self.pixels.from_nominal(batch)),
                student=None if ask is None else ask(seen),
                latents=latents,
                seen=seen,
            )
            self.objective.commit(view)
        labels = logits.argmax(1) if targets is None else targets if targets.ndim == 1 else targets.argmax(1)
        return SyntheticBatch(
            images=stored.cpu(),
            labels=labels.long().cpu().clone(),
            teacher_logits=logits.cpu(),
            objective=objective,
            student_version=getattr(student or self.student, "version", -1),
        )
