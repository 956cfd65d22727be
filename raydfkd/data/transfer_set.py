"""The transfer set at a URI: what is committed, how a unit gets in, and what a student reads.

``set.json``                                      format and recipe digest, written once
``parts/<unit>-<attempt>-<random>-<seq>.parquet`` rows; garbage unless a commit names them
``commits/<unit>.json``                           one record per finished unit, created once and never changed
``closed.json``                                   synthesis has ended
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import xxhash
from pydantic import TypeAdapter

from raydfkd.data.commits import RECORD, Commit, Part, Snapshot, UnitId, parse_record
from raydfkd.data.encodings import Encoding
from raydfkd.data.shards import RAW, StoredRows, decode_part
from raydfkd.data.sink import ParquetSink
from raydfkd.data.store import Store
from raydfkd.registry import RecipeError
from raydfkd.schedule import WorkUnit

FORMAT = 1
"""Version of layout and records."""


class TransferSet:
    """Synthetic images of one recipe at a URI, shared by any number of writers and readers.

    A reader sees units, whole ones only: it lists commits and opens the parts they name. Any attempt may be killed
    at any point and any unit made twice; that leaves files which nobody reads, and never a wrong set.

    Args:
        uri: any fsspec URI.
        digest: of the recipe and the teacher, everything that pixels depend on.
        storage_options: of the file system.
        part_rows: rows of a part at most; large images make parts of fewer rows and about 32 MiB of pixels.
        encoding: of the pixels that are written; what is read says its own.
    """

    def __init__(
        self,
        uri: str,
        *,
        digest: str,
        storage_options: Mapping[str, object] | None = None,
        part_rows: int = 4096,
        encoding: Encoding = RAW,
    ) -> None:
        self.store = Store(uri, storage_options)
        self.digest = digest
        self._part_rows = part_rows
        self._encoding = encoding
        self._commits: dict[str, Commit] = {}

    def create(self) -> None:
        """Start the set, or go on with it.

        Raises:
            RecipeError: the URI cannot be written, or holds a set of another recipe.
        """
        self.store.probe()
        if not self.store.put_new("set.json", _HEADER.dump_json(_Header(format=FORMAT, digest=self.digest))):
            self.check()

    def check(self) -> None:
        """Refuse a set of another recipe without writing anything; that there is none yet is fine.

        Raises:
            RecipeError: the URI holds a set of another recipe, or one this version cannot read.
        """
        try:
            data = self.store.get("set.json")
        except FileNotFoundError:
            return
        try:
            header = parse_record(_HEADER, data)
        except ValueError as error:
            raise self._refusal(f"has a set.json that is not a transfer set's ({error})") from None
        if header.format != FORMAT:
            raise self._refusal(f"holds a set of format {header.format} and this raydfkd reads {FORMAT}")
        if header.digest != self.digest:
            raise self._refusal(
                f"holds a set of another recipe (digest {header.digest[:12]} instead of {self.digest[:12]})"
            )

    def open(self, unit: WorkUnit, *, attempt: int = 1) -> ParquetSink:
        """Begin an attempt at ``unit``.

        Raises:
            ValueError: its id cannot be a file name.
        """
        _UNIT_ID.validate_python(unit.id)
        return ParquetSink(
            self.store,
            unit,
            attempt=attempt,
            part_rows=self._part_rows,
            encoding=self._encoding,
            publish=self._publish,
        )

    def committed(self) -> set[str]:
        """Ids of committed units, from names alone."""
        return {path[len("commits/") : -len(".json")] for path in self.store.list("commits") if path.endswith(".json")}

    def snapshot(self, within: Collection[str] | None = None) -> Snapshot:
        """What is committed now, of the units ``within`` if they are given; a record is fetched once.

        Raises:
            ValueError: a record is not one; names it.
        """
        units = self.committed() if within is None else self.committed() & set(within)
        return Snapshot(tuple(self._commit_of(unit) for unit in units))

    def read(self, part: Part) -> StoredRows:
        """Fetch a part whole.

        Raises:
            FileNotFoundError: somebody removed it.
            ValueError: its bytes or rows are not those that were committed; names it.
        """
        data = self.store.view(part.path)
        found = xxhash.xxh3_128_hexdigest(data)
        if found != part.xxh3:
            raise ValueError(
                f"{self.store.uri}/{part.path} is damaged: {len(data)} bytes with XXH3 {found[:12]}, "
                f"but {part.bytes} with {part.xxh3[:12]} were committed"
            )
        try:
            rows = decode_part(data)
        except ValueError as error:
            raise ValueError(f"{self.store.uri}/{part.path} is not a part of a transfer set: it {error}") from error
        if len(rows) != part.rows:
            raise ValueError(f"{self.store.uri}/{part.path} has {len(rows)} rows, but {part.rows} were committed")
        return rows

    def content_digest(self, within: Collection[str] | None = None) -> str:
        """``Snapshot.content_digest`` of what is committed now."""
        return self.snapshot(within).content_digest()

    def close(self, quarantined: Sequence[str]) -> None:
        """Say that synthesis has ended and the units ``quarantined`` will not come."""
        self.store.put("closed.json", _CLOSED.dump_json(_Closed(quarantined=tuple(quarantined))))

    def reopen(self) -> None:
        """Say that synthesis goes on."""
        self.store.delete("closed.json")

    def is_closed(self) -> bool:
        """Whether synthesis has ended."""
        return self.store.exists("closed.json")

    def _publish(self, commit: Commit) -> Commit:
        if self.store.put_new(f"commits/{commit.unit}.json", commit.to_json()):
            return commit
        return self._commit_of(commit.unit)

    def _commit_of(self, unit: str) -> Commit:
        if unit not in self._commits:
            path = f"commits/{unit}.json"
            data = self.store.get(path)
            try:
                commit = Commit.from_json(data)
                if commit.unit != unit:
                    raise ValueError(f"unit is {commit.unit}")
            except ValueError as error:
                raise ValueError(f"{self.store.uri}/{path} is not the record of a commit: {error}") from None
            self._commits[unit] = commit
        return self._commits[unit]

    def _refusal(self, problem: str) -> RecipeError:
        return RecipeError(f"transfer_set.uri is {self.store.uri}: {problem}; give another uri or delete it")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    __pydantic_config__ = RECORD

    format: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Closed:
    __pydantic_config__ = RECORD

    quarantined: tuple[str, ...]


_HEADER = TypeAdapter(_Header)
_CLOSED = TypeAdapter(_Closed)
_UNIT_ID: TypeAdapter[str] = TypeAdapter(UnitId)
