"""Networks that fail in a worker, but not in the process that runs the tests."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from raydfkd.networks.small import ConvNet
from raydfkd.store.errors import OutageError


def build(**options: Any) -> ConvNet:
    """One that kills the process which builds it."""
    if "pytest" not in sys.modules:
        os.kill(os.getpid(), signal.SIGKILL)
    return ConvNet(10, 1, widths=(4, 8))


def build_cut_off(*, told: str) -> ConvNet:
    """One that behaves three times as if the store were out of reach; ``told`` is a file to count in."""
    return CutOff(Path(told))


class CutOff(ConvNet):
    """See ``build_cut_off``."""

    def __init__(self, told: Path) -> None:
        super().__init__(10, 1, widths=(4, 8))
        self._told = told

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits; that it takes such images at all is seen without a gradient."""
        if images.requires_grad and "pytest" not in sys.modules and len(self._told.read_text()) < 3:
            with self._told.open("a") as file:
                file.write("x")
            raise OutageError("s3://bucket/set/parts/x.parquet cannot be written (timed out; tried again and again)")
        return super().forward(images)


def build_failing(*, at: int) -> FailsInTraining:
    """A student whose training fails at a step of its own."""
    return FailsInTraining(at)


class FailsInTraining(ConvNet):
    """Raises in training from its call ``at`` on."""

    def __init__(self, at: int) -> None:
        super().__init__(10, 1, widths=(4,))
        self._at, self._calls = at, 0

    def forward(self, images: Tensor) -> Tensor:
        self._calls += self.training
        if self._calls >= self._at and "pytest" not in sys.modules:
            raise IndexError("index 7 is out of range")
        return super().forward(images)
