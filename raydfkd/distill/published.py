"""Versions of a student on their way from its training to the synthesis that is to challenge it.

``students/<version>.safetensors``   in the transfer set's store, each created once and never changed
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from functools import partial

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from raydfkd.data.store import Store
from raydfkd.observed import Observation, ObservedNetwork
from raydfkd.registry import RecipeError

FOLDER = "students"
UNPUBLISHED = -1
"""Version of a student that nobody has published: the one that a training begins with."""

State = Mapping[str, Tensor]
Source = Callable[[int], tuple[int, State] | None]
"""Where versions come from: the newest one and its weights, if it is newer than the version given, else None."""
Announce = Callable[[int, State], None]
"""Is told of a version and its weights."""


def tell_nobody(version: int, state: State) -> None:
    """An :data:`Announce` for those who look into the store."""


class PublishedStudents:
    """The versions in a store. A version's number is the student's steps so far."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def versions(self) -> list[int]:
        """Numbers of the versions that are there now, the newest last."""
        found = (re.fullmatch(rf"{FOLDER}/(\d{{9,}})\.safetensors", path) for path in self._store.list(FOLDER))
        return sorted(int(match[1]) for match in found if match)

    def newest(self, than: int = UNPUBLISHED) -> tuple[int, State] | None:
        """The newest version, if it is newer ``than`` that; a :data:`Source`.

        Raises:
            ValueError: it is damaged; names it.
        """
        missed = UNPUBLISHED
        while (version := max(self.versions(), default=UNPUBLISHED)) > than:
            try:
                return version, self.state(version)
            except FileNotFoundError:
                if version == missed:
                    raise
                missed = version  # removed since it was listed, in favour of newer ones: look again
        return None

    def pinned(self, version: int) -> Source:
        """A source of exactly this version, whatever is published beside it."""
        assert version > UNPUBLISHED, "what nobody has published cannot be read"
        return lambda than: None if than == version else (version, self.state(version))

    def state(self, version: int) -> State:
        """Weights of a version.

        Raises:
            FileNotFoundError: it is not there, or not any more; names it.
            ValueError: it is damaged; names it.
        """
        content = self._store.get(_path(version))
        try:
            return safetensors.torch.load(content)
        except (SafetensorError, ValueError) as error:
            path = f"{self._store.uri}/{_path(version)}"
            raise ValueError(f"{path} is damaged: {len(content)} bytes that are no state dict ({error})") from None


class StudentPublisher:
    """Publishes versions of a student in training and removes old ones.

    Args:
        store: of the transfer set.
        keep: newest versions that stay.
        announce: told of each version that is the newest, and of its weights as the store has them, on CPU and nobody
            else's, for ways that are shorter than the store's.
    """

    def __init__(self, store: Store, *, keep: int = 3, announce: Announce = tell_nobody) -> None:
        assert keep > 0, "the newest version stays"
        self._store = store
        self._students = PublishedStudents(store)
        self._keep = keep
        self._announce = announce

    def publish(self, version: int, state: State) -> None:
        """Make ``state`` a version, unless that version is there: of a training that was resumed the first counts."""
        assert version > UNPUBLISHED, "a version is a number of steps"
        state = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()
        }
        is_first = self._store.put_new(_path(version), safetensors.torch.save(state))
        versions = self._students.versions()
        if version == max(versions, default=UNPUBLISHED):
            self._announce(version, state if is_first else self._students.state(version))
        for old in versions[: -self._keep]:
            self._store.delete(_path(old))


class PublishedStudent:
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


def _path(version: int) -> str:
    return f"{FOLDER}/{version:09d}.safetensors"
