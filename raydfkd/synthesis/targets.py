"""Labels that images are made for."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from raydfkd.config.registry import Registry


class TargetSampler(Protocol):
    """Draws the targets of a batch, class by class."""

    is_conditional: bool

    def __call__(self, classes: tuple[int, ...], images_per_class: int) -> Tensor | None:
        """Targets of a batch in class-major order, or None for unconditional synthesis."""


TARGETS: Registry[TargetSampler] = Registry("target sampler", [], member="is_conditional")


@TARGETS.register("balanced")
class Balanced(TargetSampler):
    """As many images of each class of the unit; labels [N], class-major."""

    is_conditional = True

    @override
    def __call__(self, classes: tuple[int, ...], images_per_class: int) -> Tensor:
        return torch.tensor(classes).repeat_interleave(images_per_class)


@TARGETS.register("none")
class Unconditional(TargetSampler):
    """No targets: one generator for all classes; what was made is labelled by the teacher afterwards."""

    is_conditional = False

    @override
    def __call__(self, classes: tuple[int, ...], images_per_class: int) -> None:
        return
