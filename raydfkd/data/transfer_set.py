"""The transfer set at a URI: its commits, the way a unit gets in, and the rows that a student reads.

``set.json``                                      format and recipe digest, written once
``recipe.json``                                   what the digest is of, for messages
``parts/<unit>-<attempt>-<random>-<seq>.parquet`` rows; garbage unless a commit names them
``commits/<unit>.json``                           one record per finished unit, created once and never changed
``quarantine/<unit>.json``                        takes a damaged commit out of the set; the next is ``<unit>@1.json``
``packs/<xxh3>.json``                             copies of many commits in one object, for readers who come late
``closed/<plan>.json``                            synthesis of a plan has ended
``changed``                                       a token that is new after each change; a hint for those who poll
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import xxhash
from pydantic import TypeAdapter

from raydfkd.data.background import in_threads
from raydfkd.data.commit_log import CommitLog, Progress
from raydfkd.data.commits import RECORD, RECORD_BYTES, Commit, DamageRecord, Part, Snapshot, UnitId, parse_record
from raydfkd.data.encodings import Encoding
from raydfkd.data.news import tell_of_change
from raydfkd.data.shards import RAW, StoredRows, decode_part
from raydfkd.data.sink import ParquetSink
from raydfkd.errors import RecipeError, differences
from raydfkd.store.errors import DamagedError
from raydfkd.store.store import Store
from raydfkd.units import WorkUnit

FORMAT = 1
"""Version of the layout and the records."""
READS = 4
"""Commits that ``verify`` reads at once; each holds a part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The finding of ``TransferSet.verify`` on one unit."""

    unit: str
    images: int
    """Images that were read and are as they were committed."""
    damage: str | None
    """The first damage in one line, and then the unit is marked damaged; None where there is none."""


class TransferSet:
    """Synthetic images of one recipe at a URI, shared by any number of writers and readers.

    A reader sees units, whole ones only: it lists commits and opens the parts they name. Any attempt may be killed
    at any point and any unit made twice; that leaves files which nobody reads, and never a wrong set. A commit that
    turns out to be damaged is taken out: it is in no later snapshot, and its unit can be committed again.

    An operation that the store fails for good raises ``StoreError`` in one line.

    Args:
        uri: any fsspec URI.
        digest: of the recipe and the teacher, everything that pixels depend on.
        made_of: the same as plain data; written beside the set, so that a reader with another recipe is told what
            differs.
        storage_options: of the file system.
        part_rows: maximum of rows in a part; large images make parts of fewer rows and about 32 MiB of pixels.
        encoding: of the pixels and logits that are written; each part that is read names its own.
    """

    def __init__(
        self,
        uri: str,
        *,
        digest: str,
        made_of: Mapping[str, object] | None = None,
        storage_options: Mapping[str, object] | None = None,
        part_rows: int = 4096,
        encoding: Encoding = RAW,
    ) -> None:
        self.store = Store(uri, storage_options)
        self.digest = digest
        self.made_of = dict(made_of or {})
        self._part_rows = part_rows
        self._encoding = encoding
        self._log = CommitLog(self.store, self.check)

    @classmethod
    def at(cls, uri: str, storage_options: Mapping[str, object] | None = None) -> TransferSet:
        """The set that is there, of whatever recipe, to read it.

        Raises:
            RecipeError: there is none, or one that this version cannot read.
        """
        found = cls(uri, digest="", storage_options=storage_options)
        header = found._header()
        if header is None:
            raise RecipeError(
                f"transfer_set.uri is {found.store.uri}: there is no transfer set, for it has no set.json; "
                "`raydfkd synthesize` makes one"
            )
        found.digest, found.made_of = header.digest, found._made_of_there()
        return found

    def create(self) -> None:
        """Start the set, or continue it.

        Raises:
            RecipeError: the URI cannot be written, or holds a set of another recipe.
        """
        self.store.probe()
        if not self.store.put_new("set.json", _HEADER.dump_json(_Header(format=FORMAT, digest=self.digest))):
            self.check()
        elif self.made_of:
            self.store.put_new("recipe.json", json.dumps(self.made_of, indent=1).encode())

    def check(self) -> None:
        """Refuse a set of another recipe without writing anything; that there is none yet is fine.

        Raises:
            RecipeError: the URI holds a set of another recipe, or one this version cannot read.
        """
        header = self._header()
        if header is not None and header.digest != self.digest:
            raise self._refusal(f"holds a set of another recipe ({self._difference(header.digest)})")

    def _header(self) -> _Header | None:
        """The header of the set that is there, if there is one; RecipeError where this version cannot read it."""
        try:
            header = parse_record(_HEADER, self.store.get("set.json", at_most=RECORD_BYTES))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise self._refusal(f"has a set.json that is not a transfer set's ({error})") from None
        if header.format != FORMAT:
            raise self._refusal(f"holds a set of format {header.format} and this raydfkd reads {FORMAT}")
        return header

    def _made_of_there(self) -> dict[str, object]:
        """Everything that the images of the set that is there depend on; empty where it does not say."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            there = json.loads(self.store.get("recipe.json", at_most=RECORD_BYTES))
            return there if isinstance(there, dict) else {}
        return {}

    def _difference(self, digest: str) -> str:
        """The differences between the recipe of the set that is there, which has ``digest``, and this one, in words."""
        there = self._made_of_there()
        found = differences(there, self.made_of) if there and self.made_of else []
        if found:
            more = f", and {len(found) - 3} more" if len(found) > 3 else ""
            return "; ".join(found[:3]) + more
        return f"digest {digest[:12]} there and {self.digest[:12]} here"

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
            publish=self._log.publish,
        )

    def committed(self) -> Set[str]:
        """Ids of committed units, from names alone."""
        return self._log.committed()

    def progress(self) -> Progress:
        """Ids that ``committed`` and ``damaged`` return, by a single listing."""
        return self._log.progress()

    def damaged(self) -> Set[str]:
        """Ids of units whose commit was marked damaged and that have no other yet, from names alone: to be made again.

        Units that a run gave up are others; ``close`` keeps those.
        """
        return self._log.damaged()

    def snapshot(self, within: Collection[str] | None = None) -> Snapshot:
        """The commits that count now, of the units ``within`` if they are given; a record is fetched once.

        A record that cannot be read is marked damaged with a warning, and its unit is left out.

        Raises:
            RecipeError: a record cannot be read, and the set is of another recipe or format.
        """
        return self._log.snapshot(within)

    def commit_of(self, unit: str) -> Commit | None:
        """The commit of a unit that counts now, or None; as exact as single objects are where listings lag behind."""
        return self._log.find(unit)

    def remember(self, commit: Commit) -> None:
        """Take note of a commit that a sink has made, on whatever machine: no snapshot here need fetch its record."""
        self._log.remember(commit)

    def pack(self) -> None:
        """Write copies of many remembered commits into one object, where there are many, for readers who come late."""
        self._log.pack()

    def read(self, part: Part) -> StoredRows:
        """Fetch a part whole.

        Raises:
            DamagedError: it is gone, or its bytes or rows are not those that were committed; names it.
        """
        try:
            return self._read_once(part)
        except DamagedError:
            return self._read_once(part)  # bytes that were damaged only on their way arrive whole now

    def mark_damaged(self, commit: Commit, damage: DamagedError) -> bool:
        """Take a damaged commit out of the set; returns whether this call did.

        False where that commit is out of the set already, whoever took it out and whatever was committed since.

        Args:
            commit: from a snapshot, however old.
            damage: why; what ``read`` raised.
        """
        return self._log.mark_damaged(commit, damage)

    def verify(self, within: Collection[str] | None = None) -> Iterator[Verdict]:
        """Read every part that is committed; marks what is damaged and says of each unit how it is.

        Raises:
            RecipeError: the set is of another recipe or format.
        """
        self.check()
        known = self.damaged()
        snapshot = self.snapshot(within)
        for unit in sorted(self.damaged() - known - set(snapshot.units)):
            record = self._log.reason(unit)
            if record is not None:
                yield Verdict(unit=unit, images=0, damage=str(self._damage(record)))
        yield from in_threads(self._verdict_on, snapshot.commits, threads=READS)

    def content_digest(self, within: Collection[str] | None = None) -> str:
        """``Snapshot.content_digest`` of what is committed now."""
        return self.snapshot(within).content_digest()

    def close(self, plan: str, given_up: Sequence[str] = ()) -> None:
        """Say that synthesis of a plan has ended and its units ``given_up`` will not come; plans share a set.

        Args:
            plan: names it; see ``raydfkd.units.plan_name``.
            given_up: ids of units.
        """
        tell_of_change(self.store)  # first, so that who finds it closed does not rely on an older listing
        self.store.put(_closed(plan), json.dumps({"given_up": list(given_up)}).encode())

    def reopen(self, plan: str) -> None:
        """Say that synthesis of a plan is under way again."""
        self.store.delete(_closed(plan))

    def is_closed(self, plan: str) -> bool:
        """Whether synthesis of a plan has ended."""
        return self.store.exists(_closed(plan))

    def __iter__(self) -> Iterator[StoredRows]:
        """The rows of every part that is committed now, part by part; see ``StoredRows``."""
        for commit in self.snapshot().commits:
            for part in commit.parts:
                yield self.read(part)

    def _read_once(self, part: Part) -> StoredRows:
        try:
            data = self.store.view(part.path, at_most=part.bytes)
        except FileNotFoundError:
            raise DamagedError(self.store.uri, part.path, "does not exist, but was committed") from None
        except ValueError as error:
            raise DamagedError(self.store.uri, part.path, f"is damaged: {error}, which were committed") from None
        found = xxhash.xxh3_128_hexdigest(data)
        if found != part.xxh3:
            problem = f"is damaged: {len(data)} bytes with XXH3 {found[:12]}"
            raise DamagedError(
                self.store.uri, part.path, f"{problem}, but {part.bytes} with {part.xxh3[:12]} were committed"
            )
        try:
            rows = decode_part(data)
        except ValueError as error:
            raise DamagedError(self.store.uri, part.path, f"is not a part of a transfer set: it {error}") from error
        if len(rows) != part.rows:
            raise DamagedError(self.store.uri, part.path, f"has {len(rows)} rows, but {part.rows} were committed")
        return rows

    def _verdict_on(self, commit: Commit) -> Verdict:
        images = 0
        try:
            for part in commit.parts:
                images += len(self.read(part))
        except DamagedError as damage:
            self.mark_damaged(commit, damage)
            return Verdict(unit=commit.unit, images=images, damage=str(damage))
        return Verdict(unit=commit.unit, images=images, damage=None)

    def _damage(self, record: DamageRecord) -> DamagedError:
        return DamagedError(self.store.uri, record.path, record.reason)

    def _refusal(self, problem: str) -> RecipeError:
        return RecipeError(
            f"transfer_set.uri is {self.store.uri}: {problem}; use the recipe and --set of then, or give another uri"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    __pydantic_config__ = RECORD

    format: int
    digest: str


def _closed(plan: str) -> str:
    return f"closed/{plan}.json"


_HEADER = TypeAdapter(_Header)
_UNIT_ID: TypeAdapter[str] = TypeAdapter(UnitId)
