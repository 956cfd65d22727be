"""``faulty://``: an object store in memory that fails now and then, in the ways that real ones do."""

from __future__ import annotations

import random
import threading
from collections import Counter, deque

import fsspec
from botocore.exceptions import ClientError, ReadTimeoutError
from fsspec.implementations.memory import MemoryFileSystem
from s3fs.errors import translate_boto_error

PLANS = {}
"""Faults by the name that ``storage_options`` have in ``plan``."""


class Faults:
    """What goes wrong how often, from a seed; counts what it did.

    Args:
        seed: of the draws.
        rates: probability of ``refused`` (503, nothing happened), ``timeout`` (nothing happened), ``lost`` (it
            happened, the answer was lost) and ``partial`` (half an object appeared, for plain writes only) for each
            operation, and of ``stale`` for each listing.
        staleness: operations that a stale listing lags behind at most.
        creates: ``once``, or what it does with create-only writes instead: ``always`` or ``never``.
    """

    def __init__(self, seed=0, *, staleness=50, creates="once", **rates):
        self.rates = rates
        self.creates = creates
        self.counts = Counter()
        self.operations = Counter()
        self.lock = threading.RLock()
        self.is_on = True
        self._rng = random.Random(seed)
        self._staleness = staleness
        self._written = deque(maxlen=1000)

    def draw(self, kinds):
        point = self._rng.random() if self.is_on else 1.0
        for kind in kinds:
            point -= self.rates.get(kind, 0.0)
            if point < 0:
                self.counts[kind] += 1
                return kind
        return None

    def wrote(self, path):
        self._written.append((self.operations.total(), path))

    def newest(self):
        """What a stale listing may not have yet."""
        begin = self.operations.total() - self._rng.randint(1, self._staleness)
        return {path for operation, path in self._written if operation >= begin}


class Script(Faults):
    """Faults in a given order, one for each operation that can have it; None for none."""

    def __init__(self, *kinds, **options):
        super().__init__(**options)
        self._kinds = list(kinds)

    def draw(self, kinds):
        return self._kinds.pop(0) if self._kinds and self._kinds[0] in (*kinds, None) else None


def error(kind):
    if kind == "unknown":
        message = "A header you provided implies functionality that is not implemented."
        answer = {"Error": {"Code": "NotImplemented", "Message": message}}
        return translate_boto_error(ClientError({**answer, "ResponseMetadata": {"HTTPStatusCode": 501}}, "PutObject"))
    if kind == "refused":
        answer = {"Error": {"Code": "SlowDown", "Message": "Please reduce your request rate."}}
        return translate_boto_error(ClientError({**answer, "ResponseMetadata": {"HTTPStatusCode": 503}}, "PutObject"))
    return TimeoutError() if kind == "timeout" else ReadTimeoutError(endpoint_url="http://s3.example")


class FaultyFileSystem(MemoryFileSystem):
    protocol = "faulty"
    store = {}
    pseudo_dirs = [""]

    def __init__(self, plan, **options):
        super().__init__(**options)
        self._faults = PLANS[plan]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("faulty://"))

    def pipe_file(self, path, value, mode="overwrite", **_):
        def write():
            if mode == "create" and self._faults.creates == "never":
                raise error("unknown")
            if mode == "create" and self._faults.creates == "once" and path in self.store:
                raise FileExistsError(path)
            super(FaultyFileSystem, self).pipe_file(path, value)
            self._faults.wrote(path)

        def write_half():
            super(FaultyFileSystem, self).pipe_file(path, value[: len(value) // 2])

        path = self._strip_protocol(path)
        return self._attempted(f"{mode} write", write, half=write_half if mode == "overwrite" else None)

    def cat_file(self, path, **_):
        return self._attempted("read", lambda: super(FaultyFileSystem, self).cat_file(path))

    def info(self, path, **_):
        def look():
            file = self.store.get(self._strip_protocol(path))
            if file is None:
                raise FileNotFoundError(path)
            return {"name": path, "size": file.size, "type": "file", "created": file.created}

        return self._attempted("info", look)

    def rm_file(self, path):
        return self._attempted("delete", lambda: self._rm(path))

    def ls(self, path, detail=True, **_):
        def look():
            within = f"{self._strip_protocol(path)}/"
            hidden = self._faults.newest() if self._faults.draw(["stale"]) else set()
            within_it = {
                name[len(within) :]: file
                for name, file in self.store.items()
                if name.startswith(within) and name not in hidden
            }
            folders = {name.partition("/")[0] for name in within_it if "/" in name}
            return [
                *({"name": within + name, "size": 0, "type": "directory"} for name in sorted(folders)),
                *(
                    {"name": within + name, "size": file.size, "type": "file", "created": file.created}
                    for name, file in within_it.items()
                    if "/" not in name
                ),
            ]

        return self._attempted("list", look)

    def _attempted(self, operation, act, half=None):
        with self._faults.lock:
            self._faults.operations[operation] += 1
            fault = self._faults.draw(["refused", "timeout", "lost", *(["partial"] if half else [])])
            if fault is None:
                return act()
            if fault == "lost":
                act()
            elif fault == "partial":
                half()
            raise error(fault)


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
