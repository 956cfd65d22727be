"""Batches of images that flow from synthesizers through the transfer set to students."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticBatch:
    """Images that were kept, with the teacher's logits for exactly these pixels; its memory is its own.

    N images of C channels, K classes.
    """

    images: Tensor
    """[N, C, H, W], uint8."""
    labels: Tensor
    """[N], int64: the class that was asked for, which is on top in a soft target, or the teacher's answer for
    unconditional methods."""
    teacher_logits: Tensor
    """[N, K], float16."""
    objective: float
    """Value of the objective when the batch was kept."""
    student_version: int = -1
    """Version of the student that the objective asked; -1 for none."""

    def __len__(self) -> int:
        """Images in the batch."""
        return len(self.labels)

    def rows(self, rows: slice | Tensor) -> SyntheticBatch:
        """The images that ``rows`` selects, with what belongs to them."""
        return replace(
            self, images=self.images[rows], labels=self.labels[rows], teacher_logits=self.teacher_logits[rows]
        )

    def state_dict(self) -> dict[str, Any]:
        """The batch as tensors and plain data, of which ``SyntheticBatch(**state)`` is made again."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
