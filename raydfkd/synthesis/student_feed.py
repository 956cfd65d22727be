"""The student as the judge asks it: its newest version, or the live one of a training in this process."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from raydfkd.data.student_versions import UNPUBLISHED, Source, State
from raydfkd.errors import RecipeError
from raydfkd.networks.input_gradients import FastInputGradients
from raydfkd.networks.observed import Observation, ObservedNetwork


class StoredStudentFeed:
    """The newest version of a student as the judge asks it: a ``StudentFeed``.

    In eval mode, normalising by its running statistics, its weights frozen; gradients reach the images. Until there
    is a version it is ``student`` as given, and says that it is :data:`UNPUBLISHED`.

    Args:
        student: as fresh as the training's; left as it is.
        source: of newer versions.
        device: of the images.
        precision: of its convolutions.
        compiled: make one graph of it.
    """

    def __init__(
        self,
        student: nn.Module,
        source: Source | None,
        *,
        device: torch.device,
        precision: torch.dtype = torch.float32,
        compiled: bool = False,
    ) -> None:
        self._source = source
        self._observed = ObservedNetwork(student, frozen=True, precision=precision, compiled=compiled).to(device)
        self.version = UNPUBLISHED
        """The version in use."""

    def follow(self, source: Source | None) -> None:
        """Take versions from ``source`` from the next look on; None for no student at all, from now on."""
        self._source = source
        if source is None:
            self.version = UNPUBLISHED

    def refresh(self) -> int:
        """Take the newest version; returns its number.

        Raises:
            RecipeError: it is of another network.
        """
        found = None if self._source is None else self._source(self.version)
        if found is not None:
            self._load(*found)
            self.version = found[0]
        return self.version

    def __call__(self, images: Tensor) -> Observation | None:
        """The answer of the version in use to ``images`` [N, C, H, W] in its units; None where none is followed."""
        return None if self._source is None else self._observed(images)

    def _load(self, version: int, state: State) -> None:
        own = self._observed.state_dict()
        unlike = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
        wrong = sorted({*unlike, *(own.keys() ^ state.keys())})
        if wrong:
            raise RecipeError(
                f"student.network has other weights than version {version} of the student ({', '.join(wrong[:3])}); "
                "restore it or give another transfer_set.uri"
            )
        self._observed.load_state_dict(state)


class LiveStudentFeed:
    """A student in training as the judge asks it: a ``StudentFeed`` for online (adversarial) synthesis.

    Gradients reach the images and nothing else: the student's weights, their gradients and its running statistics are
    after each question what they were before.

    Args:
        student: in its place on the device, without a wrapper for data parallelism, whose hooks would wait for others.
        batchnorm: normalise by the statistics of the batch, as a student in training does (and its dropout works), or
            by its running ones in eval mode.
        precision: of its convolutions.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        batchnorm: Literal["running", "batch"] = "batch",
        precision: torch.dtype = torch.float32,
    ) -> None:
        self._student = student
        self._batchnorm = batchnorm
        self._precision = precision
        self.version = UNPUBLISHED
        """Number that is recorded beside images made against it; whoever trains it may count here."""

    def __call__(self, images: Tensor) -> Observation:
        """The student's answer of this moment to ``images`` [N, C, H, W] in its units."""
        own = {name: weights.detach() for name, weights in self._student.named_parameters()}
        # Copies, for a layer that normalises by the batch writes to its running statistics.
        own |= {name: buffer.clone() for name, buffer in self._student.named_buffers()}
        modes = {module: module.training for module in self._student.modules()}
        gradients = FastInputGradients() if images.device.type == "cpu" else nullcontext()
        if self._batchnorm == "running":
            self._student.eval()
        try:
            with gradients, torch.autocast(images.device.type, self._precision, self._precision != torch.float32):
                logits: Tensor = functional_call(self._student, own, (images,))
        finally:
            for module, mode in modes.items():
                module.training = mode
        return Observation(logits=logits.float())
