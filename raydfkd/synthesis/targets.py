"""Which labels images are made for."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from raydfkd.config.registry import Registry


class TargetSampler(Protocol):
    """Draws the targets of a batch, class by class."""

    is_conditional: bool

    def __call__(self, classes: tuple[int, ...], images_per_class: int) -> Tensor | None:
        """Targets of a batch in class-major order, or None for unconditional synthesis."""


TARGETS: Registry[TargetSampler] = Registry("target sampler", [], member="is_conditional")


@TARGETS.register("balanced")
class Balanced:
    """As many images of each class of the unit; labels [N], class-major."""

    is_conditional = True

    def __call__(self, classes: tuple[int, ...], images_per_class: int) -> Tensor:
        """See the class."""
        return torch.tensor(classes).repeat_interleave(images_per_class)


@TARGETS.register("none")
class Unconditional:
    """No targets: one generator for all classes; what was made is labelled by the teacher afterwards."""

    is_conditional = False

    def __call__(self, classes: tuple[int, ...], images_per_class: int) -> None:
        """See the class."""
        return
