"""Packs of commit records: many records in one object, so that a reader who comes late need not fetch each.

``packs/<xxh3>.json``   some commits, named after the bytes; copies: the records stay the truth
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Sequence

import xxhash

from raydfkd.data.background import in_threads
from raydfkd.data.commits import Commit, Snapshot
from raydfkd.store.errors import StoreError
from raydfkd.store.store import Store

logger = logging.getLogger(__name__)
PACK = 512
"""Records from which on a pack is worth its request."""
PACK_BYTES = 64 * 2**20
"""Maximum of bytes in a pack."""
_MOST, _READS = 4096, 4


class Packs:
    """The packs of a set, as one reader sees them.

    Args:
        store: of the set.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: set[str] = set()

    def read(self) -> list[Commit]:
        """The commits of packs that were not read before; any of them may have been taken out of the set since."""
        new = [path for path in self._store.list("packs") if path not in self._seen]
        self._seen.update(new)
        return [commit for commits in in_threads(self._read_one, new, threads=_READS) for commit in commits]

    def write(self, commits: Collection[Commit]) -> None:
        """Pack commits whose records were read; a place that cannot be written to is let be."""
        ordered = sorted(commits, key=lambda commit: commit.unit)
        with contextlib.suppress(StoreError):  # nothing depends on it
            for first in range(0, len(ordered), _MOST):
                data = Snapshot(tuple(ordered[first : first + _MOST])).to_json()
                path = f"packs/{xxhash.xxh3_128_hexdigest(data)}.json"
                self._store.put(path, data)
                self._seen.add(path)

    def _read_one(self, path: str) -> Sequence[Commit]:
        try:
            data = self._store.get(path, at_most=PACK_BYTES)
            if path != f"packs/{xxhash.xxh3_128_hexdigest(data)}.json":
                raise ValueError("its bytes are not those that it is named after")
            return Snapshot.from_json(data).commits
        except (FileNotFoundError, ValueError) as error:
            logger.info(
                "%s/%s is no pack of commits (%s); their records are read instead", self._store.uri, path, error
            )
            return ()
