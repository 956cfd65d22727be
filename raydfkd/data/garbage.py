"""Garbage of a transfer set: files of attempts that died, lost a race, or made a commit that was marked damaged."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from raydfkd.data.background import in_threads
from raydfkd.data.commits import UNIT_ID
from raydfkd.data.transfer_set import TransferSet
from raydfkd.store.folders import Entry

REQUESTS = 16
"""Units that are looked at, and objects that are deleted, at once."""
_PART = re.compile(rf"(?P<attempt>parts/(?P<unit>{UNIT_ID})-\d+-[0-9a-f]{{8}})-\d{{4,}}\.parquet")
_STATE = re.compile(rf"resume/(?P<unit>{UNIT_ID})\.pt")
_LEFTOVER = re.compile(r"(.*/)?\.(.+\.|probe-)[0-9a-f]{32}")
_FOLDERS = ("", "commits", "quarantine", "packs", "closed", "resume")


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """The objects that ``collect_garbage`` removed, or would have."""

    paths: tuple[str, ...]
    """Names of the objects, relative to the set, sorted."""
    bytes: int
    """Size of all of them."""


def collect_garbage(transfer_set: TransferSet, *, older_than_s: float, dry_run: bool) -> Garbage:
    """Remove parts that no commit names, checkpoints of committed units, and temporary files of killed processes.

    Can run beside writers and readers. Ages are by the store's clock, whose seconds may be whole ones, so that a wrong
    one here or on a worker does no harm. An attempt is as old as its newest part: let ``older_than_s`` be longer than
    an attempt ever takes between two parts and to commit. Should one come back later all the same, its commit is
    marked damaged when it is read and the unit is made again. Parts of a unit that has a checkpoint stay, and so do
    the records of commits and of damage, which are small and are true for ever. A reader with an old
    snapshot may miss parts of what was marked damaged since.

    Args:
        transfer_set: whose garbage it is.
        older_than_s: the least age.
        dry_run: whether to report only; a probe for the time is written all the same, and what ``snapshot`` finds
            damaged is marked damaged.

    Raises:
        RecipeError: the set is of another recipe or format.
        StoreError: the store failed; the objects that were removed until then were garbage.
    """
    transfer_set.check()
    store = transfer_set.store
    # The listings give candidates: old parts that no commit names, old checkpoints of committed units and leftovers.
    # Just before the deletion each candidate's unit is looked up once more, since a commit may have come meanwhile.
    # time before listings, listings before commits: all that comes meanwhile is too young, or named by a commit
    latest = store.now() - older_than_s
    parts = store.entries("parts")
    others = [entry for folder in _FOLDERS for entry in store.entries(folder)] + list(parts)
    committed = transfer_set.snapshot()
    units = set(committed.units)
    named = {part.path for commit in committed.commits for part in commit.parts}
    resumable = {_unit_of(_STATE, entry) for entry in others} - units  # their states name parts of attempts that ended
    orphans = [
        entry
        for entry in _of_old_attempts(parts, latest)
        if entry.path not in named and _unit_of(_PART, entry) not in resumable
    ]
    states = [entry for entry in others if _unit_of(_STATE, entry) in units and _is_old(entry, latest)]
    garbage = [
        *(entry for entry in others if _LEFTOVER.fullmatch(entry.path) and _is_old(entry, latest)),
        *_still_garbage(transfer_set, orphans, states),
    ]
    if not dry_run:
        list(in_threads(lambda entry: store.delete(entry.path), garbage, threads=REQUESTS))
    return Garbage(paths=tuple(sorted(entry.path for entry in garbage)), bytes=sum(entry.bytes for entry in garbage))


def _of_old_attempts(parts: Iterable[Entry], latest: float) -> Iterator[Entry]:
    """Parts whose attempts wrote nothing after ``latest``; files that no sink wrote are not ours."""
    attempts: dict[str, list[Entry]] = {}
    for entry in parts:
        match = _PART.fullmatch(entry.path)
        if match:
            attempts.setdefault(match["attempt"], []).append(entry)
    return (entry for entries in attempts.values() if all(_is_old(e, latest) for e in entries) for entry in entries)


def _still_garbage(transfer_set: TransferSet, orphans: list[Entry], states: list[Entry]) -> list[Entry]:
    """The entries that are still garbage once their units' commits are looked up singly, long after the listing."""
    by_unit: dict[str, tuple[list[Entry], list[Entry]]] = {}
    for pattern, entries, kind in ((_PART, orphans, 0), (_STATE, states, 1)):
        for entry in entries:
            by_unit.setdefault(_unit_of(pattern, entry), ([], []))[kind].append(entry)

    def of(unit: str) -> list[Entry]:
        commit = transfer_set.commit_of(unit)
        if commit is None:
            return by_unit[unit][0]
        named = {part.path for part in commit.parts}
        return [entry for entry in by_unit[unit][0] if entry.path not in named] + by_unit[unit][1]

    return [entry for found in in_threads(of, sorted(by_unit), threads=REQUESTS) for entry in found]


def _unit_of(pattern: re.Pattern[str], entry: Entry) -> str:
    match = pattern.fullmatch(entry.path)
    return match["unit"] if match else ""


def _is_old(entry: Entry, latest: float) -> bool:
    return entry.modified is not None and entry.modified <= latest
