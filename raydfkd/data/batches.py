"""Batches of images that flow from synthesizers through the transfer set to students."""

from __future__ import annotations

from dataclasses import dataclass

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
