"""Objects under one URI, with the few operations that a commit protocol needs."""

from __future__ import annotations

import contextlib
import logging
import mmap
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol

from raydfkd.errors import RecipeError
from raydfkd.report.redaction import redacted, secrets_in, secrets_of
from raydfkd.store.errors import OutageError, StoreError, explain, is_missing_bucket
from raydfkd.store.folders import Entry, Folder, LocalFolder, ObjectFolder
from raydfkd.store.retry import is_transient, patiently

logger = logging.getLogger(__name__)
T = TypeVar("T")
Data = TypeVar("Data", bytes, bytes | mmap.mmap)
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Extra of raydfkd that installs a protocol's file system."""
_PROBE_ATTEMPTS = 3


class Store:
    """A folder of objects at any fsspec URI; each object is written whole or not at all.

    Paths are relative to the URI, with forward slashes. Names that begin with a dot are ours alone and in no ``list``.
    Can be pickled and used from several threads. A local path is made absolute at once, so that a copy that was
    pickled to a process elsewhere means the same folder.

    Object stores that throttle, time out or lose a connection are asked again for about a minute. A failure for good
    is a ``StoreError`` in one line without any secret: FileNotFoundError is left for objects that are not there.

    ``put_new`` is exact on local file systems that have hard links, in memory, and wherever fsspec's
    ``mode="create"`` is a conditional write (S3, Google Cloud Storage). ``probe`` refuses any other place.

    Args:
        uri: any fsspec URI, or a local path.
        storage_options: of the file system.
    """

    def __init__(self, uri: str, storage_options: Mapping[str, object] | None = None) -> None:
        protocol = get_protocol(uri)
        is_local = protocol in ("file", "local")
        self._location: str = LocalFileSystem._strip_protocol(uri) if is_local else uri.removesuffix("/")
        self._storage_options = dict(storage_options or {})
        self._is_remote = not is_local and protocol != "memory"
        self._folder: Folder = (
            LocalFolder(Path(self._location)) if is_local else ObjectFolder(self._location, self._storage_options)
        )

    def __reduce__(self) -> tuple[Callable[..., Store], tuple[str, dict[str, object]]]:
        return Store, (self._location, self._storage_options)

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    @property
    def uri(self) -> str:
        """The URI without any password in it, for messages."""
        return redacted(self._location)

    def put(self, path: str, data: bytes, *, attempts: int | None = None) -> None:
        """Write an object, replacing one of the same name; readers see the old bytes or the new ones.

        Args:
            path: of the object.
            data: its content.
            attempts: how often to try; as often as about a minute allows unless given.

        Raises:
            StoreError: it cannot be written; on local disks nothing of it is left.
        """
        self._do("written", path, partial(self._folder.put, path, data), attempts)

    def put_new(self, path: str, data: bytes) -> bool:
        """Write an object unless there is one of that name; of several racing writers one gets True.

        False can also mean that our own write succeeded, its answer was lost and it was tried again: compare
        contents before concluding that somebody else was faster.

        Raises:
            StoreError: it cannot be written, or nobody knows whether it was.
        """
        return self._do("written", path, partial(self._folder.put_new, path, data))

    def get(self, path: str, *, at_most: int | None = None) -> bytes:
        """Read an object whole.

        Args:
            path: of the object.
            at_most: bytes that it may have; no more are fetched. None for any number.

        Raises:
            FileNotFoundError: there is none of that name.
            StoreError: it cannot be read.
            ValueError: it has more bytes.
        """
        data = self._do("read", path, partial(self._folder.get, path, None if at_most is None else at_most + 1))
        return _within_size(data, at_most)

    def view(self, path: str, *, at_most: int | None = None) -> bytes | mmap.mmap:
        """Read as ``get`` does, for objects that are never changed: a local one is mapped, not copied into memory.

        Args:
            path: of the object.
            at_most: bytes that it may have; None for any number.

        Raises:
            FileNotFoundError: there is none of that name.
            StoreError: it cannot be read.
            ValueError: it has more bytes.
        """
        data = self._do("read", path, partial(self._folder.view, path, None if at_most is None else at_most + 1))
        return _within_size(data, at_most)

    def exists(self, path: str) -> bool:
        """Whether there is an object of that name now.

        Raises:
            StoreError: the store does not say.
        """
        return self._do("read", path, partial(self._folder.exists, path))

    def list(self, prefix: str) -> list[str]:
        """Sorted paths of the objects directly under folder ``prefix``, as they are now; [] if there is no folder.

        Raises:
            StoreError: it cannot be listed; also where it is the bucket that does not exist.
        """
        with contextlib.suppress(FileNotFoundError):
            names = self._do("listed", prefix, partial(self._folder.names, prefix))
            return sorted(_within(prefix, name) for name in names if not name.startswith("."))
        return []

    def entries(self, prefix: str) -> tuple[Entry, ...]:
        """The objects that ``list`` lists, with size and time of writing, and those whose names begin with a dot.

        Raises:
            StoreError: it cannot be listed; also where it is the bucket that does not exist.
        """
        with contextlib.suppress(FileNotFoundError):
            found = self._do("listed", prefix, partial(self._folder.entries, prefix))
            named = [replace(entry, path=_within(prefix, entry.path)) for entry in found]
            return tuple(sorted(named, key=lambda entry: entry.path))
        return ()

    def now(self) -> float:
        """The time by the clock that ``entries`` go by, in seconds since 1970; writes an object to learn it.

        Raises:
            StoreError: the object cannot be written, or the store does not keep times.
        """
        name = _probe_name()
        self.put(name, b"probe")
        try:
            modified = self._do("read", name, partial(self._folder.modified, name))
        finally:
            self.delete(name)
        if modified is None:
            raise StoreError(f"{self.uri}: the store does not say when an object was written")
        return modified

    def delete(self, path: str) -> None:
        """Remove an object; one that is missing is fine.

        Raises:
            StoreError: it cannot be removed.
        """
        with contextlib.suppress(FileNotFoundError):
            self._do("deleted", path, partial(self._folder.delete, path))

    def probe(self, key: str = "transfer_set.uri", *, once: bool = True) -> None:
        """Make sure that objects can be created here, ``once`` each, and leave nothing behind; ``key`` is blamed.

        Raises:
            RecipeError: with the reason, in one line that shows no storage option.
        """
        name = _probe_name()
        try:
            creates_once = self._creates_once(self._folder.nearest(), name)
        except Exception as error:  # every file system has errors of its own; here they become the user's line
            raise self._refusal(error, key) from None
        if once and not creates_once:
            raise RecipeError(
                f"{key} is {self.uri}: cannot create an object only once, so two workers could commit the same "
                "unit; give a URI on a local disk, S3 or Google Cloud Storage"
            )

    def _creates_once(self, folder: Folder, name: str) -> bool:
        create, is_refused = partial(folder.put_new, name, b"probe"), False
        try:
            self._patiently("written", name, create, attempts=_PROBE_ATTEMPTS)
        except Exception as error:
            if is_transient(error):
                raise
            # some servers refuse create-only writes and take plain ones; where these fail too, theirs is the reason
            self._patiently("written", name, partial(folder.put, name, b"probe"), attempts=_PROBE_ATTEMPTS)
            is_refused = True
        try:
            return not is_refused and not self._patiently("written", name, create)
        finally:
            self._patiently("deleted", name, partial(folder.delete, name))

    def _do(self, act: str, path: str, call: Callable[[], T], attempts: int | None = None) -> T:
        _check(path)
        try:
            return self._patiently(act, path, call, attempts)
        except Exception as error:  # every file system has errors of its own
            if isinstance(error, FileNotFoundError) and act != "written" and not is_missing_bucket(error):
                raise FileNotFoundError(f"{self.uri}/{path} does not exist") from None
            failure = f"{self.uri}/{path} cannot be {act} ({self._explain(error)}"
            if self._is_remote and is_transient(error):
                raise OutageError(f"{failure}; tried again and again)") from None
            raise StoreError(f"{failure})") from None

    def _patiently(self, act: str, path: str, call: Callable[[], T], attempts: int | None = None) -> T:
        if not self._is_remote:
            return call()

        def tell(error: BaseException, wait_s: float) -> None:
            reason = self._explain(error)
            logger.info("%s/%s was not %s (%s); again in %.1f s", self.uri, path, act, reason, wait_s)

        return patiently(call, tell=tell, attempts=attempts)

    def _explain(self, error: BaseException) -> str:
        if is_missing_bucket(error):
            return "no such bucket"
        return explain(error, {*secrets_of(self._storage_options), *secrets_in(self._location)})

    def _refusal(self, error: Exception, key: str) -> RecipeError:
        problem, remedy = "cannot be written", "give a URI this machine can write to"
        protocol = get_protocol(self._location)
        if isinstance(error, ImportError):
            problem = "cannot be opened"
            if protocol in EXTRAS:
                remedy = f"pip install 'raydfkd[{EXTRAS[protocol]}]'"
        return RecipeError(f"{key} is {self.uri}: {problem} ({self._explain(error)}); {remedy}")


def _within_size(data: Data, at_most: int | None) -> Data:
    if at_most is not None and len(data) > at_most:
        raise ValueError(f"it has more than {at_most:,} bytes")
    return data


def _probe_name() -> str:
    return f".probe-{uuid4().hex}"


def _within(prefix: str, name: str) -> str:
    return f"{prefix}/{name}" if prefix else name


def _check(path: str) -> None:
    """Records may come from a stranger, and no path in them may lead out of the folder.

    Raises:
        ValueError: it could.
    """
    if path.startswith("/") or "\\" in path or "\0" in path or ".." in path.split("/"):
        raise ValueError(f"{path!r} is not a path in a store: no absolute ones, no .., no backslash")
