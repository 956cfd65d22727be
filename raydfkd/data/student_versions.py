"""Student versions: weights on their way from a student's training to the synthesis whose objective asks it.

``students/<version>.safetensors``   in the transfer set's store, each created once and never changed
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from raydfkd.networks.weights import state_bytes
from raydfkd.store.store import Store

FOLDER = "students"
UNPUBLISHED = -1
"""Version number of a student that was never published: the one that a training begins with."""
State = Mapping[str, Tensor]
Source = Callable[[int], tuple[int, State] | None]
"""A function that returns the newest version and its weights if it is newer than the version given, else None."""


class StudentVersions:
    """The versions in a store. A version's number is the student's steps so far."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def versions(self) -> list[int]:
        """Numbers of the versions that are there now, the newest last."""
        found = (re.fullmatch(rf"{FOLDER}/(\d{{9,}})\.safetensors", path) for path in self._store.list(FOLDER))
        return sorted(int(match[1]) for match in found if match)

    def newest(self, than: int = UNPUBLISHED) -> tuple[int, State] | None:
        """The newest version and its weights if it is newer than version ``than``; a :data:`Source`.

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
        """A source of this version only, whatever else is published."""
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
    """

    def __init__(self, store: Store, *, keep: int = 3) -> None:
        assert keep > 0, "the newest version stays"
        self._store = store
        self._students = StudentVersions(store)
        self._keep = keep

    def publish(self, version: int, state: State) -> None:
        """Make ``state`` a version unless that one exists: when a resumed training repeats steps, the first counts."""
        assert version > UNPUBLISHED, "a version is a number of steps"
        self._store.put_new(_path(version), state_bytes(state))
        versions = self._students.versions()
        for old in versions[: -self._keep]:
            self._store.delete(_path(old))


def _path(version: int) -> str:
    return f"{FOLDER}/{version:09d}.safetensors"
