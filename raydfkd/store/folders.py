"""The kinds of file system under a ``Store``: a local folder, and objects that fsspec reaches."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import fsspec
from fsspec.utils import get_protocol
from typing_extensions import override

from raydfkd.store.errors import is_missing_bucket, is_out_of_range

_MEMORY_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An object as a listing has it."""

    path: str
    """Name of the object, relative to the store."""
    bytes: int
    """Its size."""
    modified: float | None
    """Time of writing, in seconds since 1970 by the clock of the store; None where the store does not say."""


class Folder(Protocol):
    """The operations that a kind of file system has for ``Store``; to read or delete may raise FileNotFoundError."""

    def put(self, path: str, data: bytes) -> None:
        """Write a file, replacing one of the same name."""

    def put_new(self, path: str, data: bytes) -> bool:
        """Write a file unless there is one of that name; True for the one writer that did."""
        ...

    def get(self, path: str, at_most: int | None) -> bytes:
        """Read a file whole, or its beginning where it has more than ``at_most`` bytes."""
        ...

    def view(self, path: str, at_most: int | None) -> bytes | mmap.mmap:
        """Read a file that is never changed as ``get`` does, or map all of it into memory where that can be."""
        ...

    def exists(self, path: str) -> bool:
        """Whether there is a file of that name."""
        ...

    def entries(self, prefix: str) -> list[Entry]:
        """Files directly under a folder; their paths are names."""
        ...

    def names(self, prefix: str) -> list[str]:
        """Names of the files directly under a folder."""
        ...

    def modified(self, path: str) -> float | None:
        """Time at which a file was written, by the clock of the store."""
        ...

    def delete(self, path: str) -> None:
        """Remove a file."""

    def nearest(self) -> Folder:
        """This folder, or the innermost one above it that exists where folders have to be made."""
        ...


class LocalFolder(Folder):
    """Files, each written beside its name and then moved or linked to it."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @override
    def put(self, path: str, data: bytes) -> None:
        with self._written(path, data) as temporary:
            os.replace(temporary, self._root / path)

    @override
    def put_new(self, path: str, data: bytes) -> bool:
        with self._written(path, data) as temporary:
            try:
                os.link(temporary, self._root / path)
            except FileExistsError:
                return False
            return True

    @override
    def get(self, path: str, at_most: int | None) -> bytes:
        with (self._root / path).open("rb") as file:
            return file.read(-1 if at_most is None else at_most)

    @override
    def view(self, path: str, at_most: int | None) -> bytes | mmap.mmap:
        with (self._root / path).open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return b""  # which cannot be mapped
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @override
    def exists(self, path: str) -> bool:
        return (self._root / path).is_file()

    @override
    def entries(self, prefix: str) -> list[Entry]:
        found = []
        with os.scandir(self._root / prefix) as files:
            for file in files:
                with contextlib.suppress(FileNotFoundError):  # somebody else's temporary file
                    if file.is_file():
                        stat = file.stat()
                        found.append(Entry(path=file.name, bytes=stat.st_size, modified=stat.st_mtime))
        return found

    @override
    def names(self, prefix: str) -> list[str]:
        """Names of the files directly under a folder; unlike ``entries`` without a look at each."""
        with os.scandir(self._root / prefix) as files:
            return [file.name for file in files if file.is_file()]

    @override
    def modified(self, path: str) -> float:
        return (self._root / path).stat().st_mtime

    @override
    def delete(self, path: str) -> None:
        (self._root / path).unlink()

    @override
    def nearest(self) -> LocalFolder:
        folder = next(folder for folder in (self._root, *self._root.parents) if folder.exists())
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a file")
        return LocalFolder(folder)

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


class ObjectFolder(Folder):
    """Objects under a URI of fsspec's."""

    def __init__(self, uri: str, storage_options: Mapping[str, object]) -> None:
        self._uri = uri
        self._storage_options = storage_options
        self._create_lock = _MEMORY_LOCK if get_protocol(uri) == "memory" else contextlib.nullcontext()

    @override
    def put(self, path: str, data: bytes) -> None:
        fs, key = self._open(path)
        fs.pipe_file(key, data)

    @override
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

    @override
    def get(self, path: str, at_most: int | None) -> bytes:
        fs, key = self._open(path)
        try:
            # s3fs asks for the size first, unless it is told which bytes it is to read
            data: bytes = fs.cat_file(key) if at_most is None else fs.cat_file(key, start=0, end=at_most)
        except OSError as error:
            if is_out_of_range(error):  # an empty object has no first byte
                return b""
            raise
        return data

    @override
    def view(self, path: str, at_most: int | None) -> bytes:
        return self.get(path, at_most)

    @override
    def exists(self, path: str) -> bool:
        fs, key = self._open(path)
        fs.invalidate_cache()  # s3fs would answer from an earlier listing
        try:
            fs.info(key, refresh=True)  # fsspec's own exists() takes every error for a no
        except FileNotFoundError as error:
            if is_missing_bucket(error):
                raise
            return False
        return True

    @override
    def entries(self, prefix: str) -> list[Entry]:
        return [
            Entry(path=name, bytes=int(entry["size"]), modified=_modified(entry))
            for name, entry in self._listed(prefix)
        ]

    @override
    def names(self, prefix: str) -> list[str]:
        return [name for name, _ in self._listed(prefix)]

    @override
    def modified(self, path: str) -> float | None:
        """Time at which an object was written, by the server's clock."""
        fs, key = self._open(path)
        fs.invalidate_cache()
        return _modified(fs.info(key, refresh=True))

    @override
    def delete(self, path: str) -> None:
        fs, key = self._open(path)
        fs.rm_file(key)

    @override
    def nearest(self) -> ObjectFolder:
        return self

    def _listed(self, prefix: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        fs, key = self._open(prefix)
        fs.invalidate_cache()
        for entry in fs.ls(key.rstrip("/"), detail=True, refresh=True):
            name = entry["name"].rpartition("/")[2]
            if entry["type"] == "file" and name:  # some S3 servers keep an object that stands for the folder itself
                yield name, entry

    def _open(self, path: str) -> tuple[fsspec.AbstractFileSystem, str]:
        # not kept: fsspec has one instance for each process and thread and finds it again by itself
        fs, key = fsspec.url_to_fs(f"{self._uri}/{path}", **self._storage_options)
        return fs, key


def _modified(entry: Mapping[str, Any]) -> float | None:
    """The time under whatever key the file system has it; memory never rewrites an object, so created is modified."""
    for key in ("mtime", "LastModified", "last_modified", "modified", "updated", "created"):
        value = entry.get(key)
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, (int, float)):
            return float(value)
    return None
