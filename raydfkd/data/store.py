"""Objects under one URI, with the few operations that a commit protocol needs."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol

from raydfkd.registry import RecipeError

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Extra of raydfkd that installs a protocol's file system."""

PUBLIC_OPTIONS = frozenset({"endpoint_url", "client_kwargs.endpoint_url", "client_kwargs.region_name", "profile"})
"""Storage options that an error may show, because it is of no use without them."""

_MEMORY_LOCK = threading.Lock()


class Store:
    """A folder of objects at any fsspec URI; each object is written whole or not at all.

    Paths are relative to the URI, with forward slashes. Names that begin with a dot are ours alone and never listed.
    Can be pickled and used from several threads. A local path is made absolute at once, so that a copy that was
    pickled to a process elsewhere means the same folder.

    ``put_new`` is exact on local file systems that have hard links, in memory, and wherever fsspec's
    ``mode="create"`` is a conditional write (S3, Google Cloud Storage).
    """

    def __init__(self, uri: str, storage_options: Mapping[str, object] | None = None) -> None:
        is_local = get_protocol(uri) in ("file", "local")
        self._location: str = LocalFileSystem._strip_protocol(uri) if is_local else uri.removesuffix("/")
        self._storage_options = dict(storage_options or {})
        self._folder: _Folder = (
            _LocalFolder(Path(self._location)) if is_local else _ObjectFolder(self._location, self._storage_options)
        )

    def __reduce__(self) -> tuple[type[Store], tuple[str, dict[str, object]]]:
        return Store, (self._location, self._storage_options)

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    @property
    def uri(self) -> str:
        """The URI without any password in it, for messages."""
        return re.sub(r"//[^/@]*@", "//***@", self._location)

    def put(self, path: str, data: bytes) -> None:
        """Write an object, replacing one of the same name; readers see the old bytes or the new ones."""
        self._folder.put(path, data)

    def put_new(self, path: str, data: bytes) -> bool:
        """Write an object unless there is one of that name; of several racing writers one gets True.

        False can also mean that our own write succeeded, its answer was lost and the client tried again: compare
        contents before concluding that somebody else was faster.
        """
        return self._folder.put_new(path, data)

    def get(self, path: str) -> bytes:
        """Read an object whole.

        Raises:
            FileNotFoundError: there is none of that name.
        """
        with self._naming(path):
            return self._folder.get(path)

    def view(self, path: str) -> bytes | mmap.mmap:
        """As ``get``, for objects that are never changed: a local one is mapped rather than copied into memory.

        Raises:
            FileNotFoundError: there is none of that name.
        """
        with self._naming(path):
            return self._folder.view(path)

    @contextlib.contextmanager
    def _naming(self, path: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.uri}/{path} does not exist") from None

    def exists(self, path: str) -> bool:
        """Whether there is an object of that name now."""
        return self._folder.exists(path)

    def list(self, prefix: str) -> list[str]:
        """Sorted paths of the objects directly under folder ``prefix``, as they are now; [] if there is no folder."""
        with contextlib.suppress(FileNotFoundError):
            within = f"{prefix}/" if prefix else ""
            return sorted(f"{within}{name}" for name in self._folder.names(prefix) if not name.startswith("."))
        return []

    def delete(self, path: str) -> None:
        """Remove an object; one that is missing is fine."""
        with contextlib.suppress(FileNotFoundError):
            self._folder.delete(path)

    def probe(self, key: str = "transfer_set.uri") -> None:
        """Make sure that objects can be created here, once each, and leave nothing behind; ``key`` is blamed if not.

        Raises:
            RecipeError: with the reason, in one line that shows no storage option.
        """
        name = f".probe-{uuid4().hex}"
        try:
            folder = self._folder.nearest()
            folder.put_new(name, b"probe")
            try:
                is_exclusive = not folder.put_new(name, b"probe")
            finally:
                folder.delete(name)
        except Exception as error:  # every file system has errors of its own; here they become the user's line
            raise self._refusal(error, key) from None
        if not is_exclusive:
            raise RecipeError(
                f"{key} is {self.uri}: ignores create-only writes, so two workers could commit the same "
                "unit; give a URI on a local disk, S3 or Google Cloud Storage"
            )

    def _refusal(self, error: Exception, key: str) -> RecipeError:
        problem, remedy = "cannot be written", "give a URI this machine can write to"
        protocol = get_protocol(self._location)
        if isinstance(error, ImportError):
            problem = "cannot be opened"
            if protocol in EXTRAS:
                remedy = f"pip install 'raydfkd[{EXTRAS[protocol]}]'"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = " ".join(reason.split()) or type(error).__name__
        for secret in sorted(_secrets(self._storage_options), key=len, reverse=True):
            reason = reason.replace(secret, "***")
        return RecipeError(f"{key} is {self.uri}: {problem} ({reason}); {remedy}")


def _secrets(options: Mapping[str, object], within: str = "") -> Iterator[str]:
    """Text of every option that is not known to be public; below four characters it is no secret but a flag."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _secrets(value, f"{within}{key}.")
        elif f"{within}{key}" not in PUBLIC_OPTIONS and len(str(value)) >= 4:
            yield str(value)


class _Folder(Protocol):
    """What a kind of file system has to do for ``Store``; ``delete`` and ``names`` may raise FileNotFoundError."""

    def put(self, path: str, data: bytes) -> None: ...
    def put_new(self, path: str, data: bytes) -> bool: ...
    def get(self, path: str) -> bytes: ...
    def view(self, path: str) -> bytes | mmap.mmap: ...
    def exists(self, path: str) -> bool: ...
    def names(self, prefix: str) -> list[str]: ...
    def delete(self, path: str) -> None: ...

    def nearest(self) -> _Folder:
        """This folder, or the innermost one above it that exists where folders have to be made."""
        ...


class _LocalFolder:
    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, path: str, data: bytes) -> None:
        with self._written(path, data) as temporary:
            os.replace(temporary, self._root / path)

    def put_new(self, path: str, data: bytes) -> bool:
        with self._written(path, data) as temporary:
            try:
                os.link(temporary, self._root / path)
            except FileExistsError:
                return False
            return True

    def get(self, path: str) -> bytes:
        return (self._root / path).read_bytes()

    def view(self, path: str) -> bytes | mmap.mmap:
        with (self._root / path).open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return b""  # which cannot be mapped
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def exists(self, path: str) -> bool:
        return (self._root / path).is_file()

    def names(self, prefix: str) -> list[str]:
        with os.scandir(self._root / prefix) as entries:
            return [entry.name for entry in entries if entry.is_file()]

    def delete(self, path: str) -> None:
        (self._root / path).unlink()

    def nearest(self) -> _LocalFolder:
        folder = next(folder for folder in (self._root, *self._root.parents) if folder.exists())
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a file")
        return _LocalFolder(folder)

    @contextlib.contextmanager
    def _written(self, path: str, data: bytes) -> Iterator[Path]:
        """A temporary file beside ``path`` with ``data`` on disk; gone afterwards, whatever happens."""
        target = self._root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid4().hex}")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # a name must not outlive its bytes when the machine loses power
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


class _ObjectFolder:
    def __init__(self, uri: str, storage_options: Mapping[str, object]) -> None:
        self._uri = uri
        self._storage_options = storage_options
        self._create_lock = _MEMORY_LOCK if get_protocol(uri) == "memory" else contextlib.nullcontext()

    def put(self, path: str, data: bytes) -> None:
        fs, key = self._open(path)
        fs.pipe_file(key, data)

    def put_new(self, path: str, data: bytes) -> bool:
        fs, key = self._open(path)
        try:
            with self._create_lock:  # fsspec's memory file system looks first and creates then
                fs.pipe_file(key, data, mode="create")
        except OSError:  # FileExistsError, or on S3 one whose number depends on the server
            if self.exists(path):
                return False
            raise
        return True

    def get(self, path: str) -> bytes:
        fs, key = self._open(path)
        data: bytes = fs.cat_file(key)
        return data

    def view(self, path: str) -> bytes:
        return self.get(path)

    def exists(self, path: str) -> bool:
        fs, key = self._open(path)
        fs.invalidate_cache()  # s3fs would answer from an earlier listing
        return bool(fs.exists(key))

    def names(self, prefix: str) -> list[str]:
        fs, key = self._open(prefix)
        fs.invalidate_cache()
        entries = fs.ls(key.rstrip("/"), detail=True, refresh=True)
        names = [entry["name"].rpartition("/")[2] for entry in entries if entry["type"] == "file"]
        return [name for name in names if name]  # some S3 servers keep an object that stands for the folder itself

    def delete(self, path: str) -> None:
        fs, key = self._open(path)
        fs.rm_file(key)

    def nearest(self) -> _ObjectFolder:
        return self

    def _open(self, path: str) -> tuple[fsspec.AbstractFileSystem, str]:
        # not kept: fsspec has one instance for each process and thread and finds it again by itself
        fs, key = fsspec.url_to_fs(f"{self._uri}/{path}", **self._storage_options)
        return fs, key
