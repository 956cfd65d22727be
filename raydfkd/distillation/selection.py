"""The best of a training's students instead of the last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

JudgeStudent = Callable[[nn.Module], float]
"""Says how good a student is, the more the better; leaves it as it was."""


class StudentSelection:
    """Holds the best student that a judge was shown so far.

    Args:
        judge: of the students.
    """

    def __init__(self, judge: JudgeStudent) -> None:
        self._judge = judge
        self._score: float | None = None
        self._student: dict[str, Tensor] = {}

    def look(self, student: nn.Module) -> None:
        """Judge ``student`` and hold a copy of it on the CPU where it is the best; of equals the later one."""
        score = self._judge(student)
        if self._score is None or score >= self._score:
            self._score = score
            self._student = {name: value.detach().cpu().clone() for name, value in student.state_dict().items()}

    def restore(self, student: nn.Module) -> None:
        """Give ``student`` the weights of the best, in place."""
        student.load_state_dict(self._student)

    def state_dict(self) -> dict[str, Any]:
        """The best student and its score; empty before the first look."""
        return {} if self._score is None else {"score": self._score, "student": self._student}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self._score = state.get("score")
        self._student = dict(state.get("student", {}))
