"""Records of a transfer set: parts, commits, damage and snapshots, as data and as JSON."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

T = TypeVar("T")
GROUP_BYTES = 32 * 2**20
"""Bytes of pixels in one row group, and in one part that ``TransferSet`` writes; a part is fetched and held whole."""
RECORD_BYTES = 4 * 2**20
"""Maximum of bytes in a record; a commit has some hundred for each part."""
BYTES_BESIDE = 28
"""Bytes of a row beside its pixels and logits: label, seed, unit, position, objective, version of the student."""
# a diverged objective is NaN and has to survive the round trip
RECORD = ConfigDict(extra="forbid", strict=True, ser_json_inf_nan="constants")
"""Pydantic settings with which every record is read and written."""
UNIT_ID = r"[A-Za-z0-9_]+([.-][A-Za-z0-9_]+)*"
"""Pattern of a unit's id, usable as a file name everywhere; no separator, no ``..`` and no ``@``."""
UnitId = Annotated[str, Field(pattern=rf"^{UNIT_ID}$", max_length=128)]
Xxh3 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Count = Annotated[int, Field(ge=1)]
RowCount = Annotated[int, Field(ge=1, le=GROUP_BYTES)]
Generation = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One Parquet file of a unit."""

    __pydantic_config__ = RECORD

    path: Annotated[str, Field(pattern=rf"^parts/{UNIT_ID}\.parquet$")]
    """Name of the file, relative to the set."""
    rows: RowCount
    """Images in it; each has a pixel at least."""
    bytes: Count
    """Size of the file."""
    xxh3: Xxh3
    """XXH3 (128 bits) of the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """The record that makes a unit part of the set."""

    __pydantic_config__ = RECORD

    unit: UnitId
    attempt: int
    """Number of the attempt at the unit, from 1."""
    seed: int
    """The unit's seed."""
    images: Count
    """Rows of all parts."""
    parts: tuple[Part, ...]
    """Files in the order their rows were written."""
    content: Xxh3
    """``rows_digest`` of the rows: the same whoever made them, in whatever parts."""
    objective: float
    """Mean over the images of the objective with which they were kept."""
    student_version: int
    """Newest version of the student that the objective asked; -1 for none."""
    seconds: float
    """Time the attempt took."""
    curve: tuple[dict[str, float], ...] = ()
    """Parts of the objective over the steps, in records of earlier versions; newer ones leave it to the metrics."""
    generation: Generation = 0
    """Number of the unit's commits that were marked damaged before this one; set when it is published."""

    def to_json(self) -> bytes:
        """The record as it is stored."""
        return _COMMIT.dump_json(self)

    @classmethod
    def from_json(cls, data: bytes) -> Commit:
        """Read a record.

        Raises:
            ValueError: the data are not exactly such a record, or it points outside the set's folder.
        """
        commit = parse_record(_COMMIT, data)
        commit.check()
        return commit

    def check(self) -> None:
        """Refuse what no writer writes: readers ask for memory by these sizes before they have seen a byte.

        Raises:
            ValueError: rows that cannot be in their part, a sum that is wrong, or a part that is named twice.
        """
        for part in self.parts:
            if part.rows > part.bytes:
                raise ValueError(f"{part.path} claims {part.rows:,} rows in {part.bytes:,} bytes")
        if sum(part.rows for part in self.parts) != self.images:
            raise ValueError(f"images is {self.images}, but its parts have {sum(part.rows for part in self.parts)}")
        if len({part.path for part in self.parts}) < len(self.parts):
            raise ValueError("a part is named twice")


@dataclass(frozen=True, slots=True, kw_only=True)
class DamageRecord:
    """The record that takes a commit out of the set for ever."""

    __pydantic_config__ = RECORD

    unit: UnitId
    generation: Generation
    """Generation of the commit."""
    path: str
    """The object that is damaged, relative to the set."""
    reason: str
    """The damage in one line."""

    def to_json(self) -> bytes:
        """The record as it is stored."""
        return _DAMAGE.dump_json(self)

    @classmethod
    def from_json(cls, data: bytes) -> DamageRecord:
        """Read a record.

        Raises:
            ValueError: the data are not exactly such a record.
        """
        return parse_record(_DAMAGE, data)


@dataclass(frozen=True)
class Snapshot:
    """The commits of a set at one moment; saved with a student, it says which images an epoch consisted of."""

    commits: tuple[Commit, ...]
    """Commits sorted by unit."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "commits", tuple(sorted(self.commits, key=lambda commit: commit.unit)))

    @cached_property
    def images(self) -> int:
        """Images of all commits."""
        return sum(commit.images for commit in self.commits)

    @property
    def units(self) -> tuple[str, ...]:
        """Ids of the committed units, sorted."""
        return tuple(commit.unit for commit in self.commits)

    def content_digest(self) -> str:
        """SHA-256 of all rows unit by unit; depends neither on the order of commits nor on who made them."""
        lines = sorted(f"{commit.unit}:{commit.content}" for commit in self.commits)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def to_json(self) -> bytes:
        """The snapshot as UTF-8."""
        return _COMMITS.dump_json(self.commits)

    @classmethod
    def from_json(cls, data: bytes) -> Snapshot:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: the data are not a list of commits.
        """
        commits = parse_record(_COMMITS, data)
        for commit in commits:
            commit.check()
        return cls(commits)

    @cached_property
    def packed(self) -> bytes:
        """The snapshot without curves, for checkpoints and other processes: some 90 bytes a unit of one part."""
        commits = tuple(replace(commit, curve=()) if commit.curve else commit for commit in self.commits)
        return zlib.compress(_COMMITS.dump_json(commits), level=1)

    @classmethod
    def unpacked(cls, data: bytes) -> Snapshot:
        """Read what ``packed`` is.

        Raises:
            ValueError: the data are not such a snapshot.
        """
        try:
            return cls.from_json(zlib.decompress(data))
        except zlib.error as error:
            raise ValueError(f"not a packed snapshot: {error}") from None


def parse_record(adapter: TypeAdapter[T], data: bytes) -> T:
    """Read JSON that may come from anybody.

    Raises:
        ValueError: the JSON does not fit; one line with the first mistake.
    """
    try:
        return adapter.validate_json(data)
    except ValidationError as error:
        finding = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, finding["loc"]))
        raise ValueError(f"{where}: {finding['msg']}" if where else finding["msg"]) from None


_COMMIT = TypeAdapter(Commit)
_DAMAGE = TypeAdapter(DamageRecord)
_COMMITS = TypeAdapter(tuple[Commit, ...])
