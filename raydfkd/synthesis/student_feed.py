"""The newest version of a student, as the judge asks it."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

from raydfkd.data.student_versions import UNPUBLISHED, Source, State
from raydfkd.errors import RecipeError
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
        self._student = copy.deepcopy(student)
        self._source = source
        self._device = device
        self._observing = partial(ObservedNetwork, frozen=True, precision=precision, compiled=compiled)
        self._observed = self._observing(self._student).to(device)
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
            version, state = found
            self._load(version, state)
            self._observed, self.version = self._observing(self._student).to(self._device), version
        return self.version

    def __call__(self, images: Tensor) -> Observation | None:
        """What the version in use says of ``images`` [N, C, H, W], normalised; None where none is followed."""
        return None if self._source is None else self._observed(images)

    def _load(self, version: int, state: State) -> None:
        own = self._student.state_dict()
        unlike = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
        wrong = sorted({*unlike, *(own.keys() ^ state.keys())})
        if wrong:
            raise RecipeError(
                f"student.network has other weights than version {version} of the student ({', '.join(wrong[:3])}); "
                "restore it or give another transfer_set.uri"
            )
        self._student.load_state_dict(dict(state))
