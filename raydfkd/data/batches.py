"""What flows from synthesizers through the transfer set to students."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticBatch:
    """Images that were kept, with what the teacher says of exactly these pixels. Owns its storage.

    N images of C channels, K classes.
    """

    images: Tensor
    """[N, C, H, W], uint8."""
    labels: Tensor
    """[N], int64: the class that was asked for, or the teacher's answer for unconditional methods."""
    teacher_logits: Tensor
    """[N, K], float16."""
    objective: float
    """Value of the objective when the batch was kept."""
    student_version: int = -1
    """Student that the objective judged against; -1 for none."""

    def __len__(self) -> int:
        """Images in the batch."""
        return len(self.labels)
