"""The log that decides which commit of a unit counts, by records that are created once and never changed.

``commits/<unit>.json``       the unit's first commit, of generation 0; ``commits/<unit>@1.json`` the next, and so on
``quarantine/<unit>.json``    takes that commit out of the set; ``quarantine/<unit>@1.json`` the next, and so on

The live generation of a unit is the first one without a record of damage, and the unit is committed if that generation
has a commit. Neither kind of record is ever deleted: a slow attempt could create it a second time.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from itertools import count

from raydfkd.data.background import in_threads
from raydfkd.data.commits import RECORD_BYTES, UNIT_ID, Commit, DamageRecord, Snapshot
from raydfkd.data.news import tell_of_change
from raydfkd.data.packs import PACK, Packs
from raydfkd.store.errors import DamagedError
from raydfkd.store.store import Store

logger = logging.getLogger(__name__)
FETCHES = 16
"""Records that are fetched at once."""
_RECORD_NAME = re.compile(rf"(?P<unit>{UNIT_ID})(@(?P<generation>[1-9][0-9]{{0,5}}))?\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The state of a set as names alone tell it."""

    committed: Set[str]
    """Ids of units with a commit that counts."""
    damaged: Set[str]
    """Ids of units whose last commit was taken out and that have no other yet."""


class CommitLog:
    """The commits of a transfer set.

    Args:
        store: of the set.
        check: raises where the set is of another format or recipe, whose records must not be taken for damaged ones.
    """

    def __init__(self, store: Store, check: Callable[[], None]) -> None:
        self._store = store
        self._check = check
        self._known: dict[str, Commit] = {}
        self._unpacked: list[Commit] = []
        self._packs = Packs(store)

    def __getstate__(self) -> dict[str, object]:
        # of a large set it would be most of what goes to each worker
        return {**self.__dict__, "_known": {}, "_unpacked": [], "_packs": Packs(self._store)}

    def committed(self) -> Set[str]:
        """Ids of committed units, from names alone."""
        return self.progress().committed

    def damaged(self) -> Set[str]:
        """Ids of units whose last commit was taken out and that have no other yet, from names alone."""
        return self.progress().damaged

    def progress(self) -> Progress:
        """Ids that ``committed`` and ``damaged`` return, by a single listing."""
        live, damaged = self._live()
        return Progress(committed=live.keys(), damaged=damaged - live.keys())

    def snapshot(self, within: Collection[str] | None = None) -> Snapshot:
        """The commits that count now; a record is fetched once, and one that is damaged is marked damaged."""
        live, _ = self._live()
        wanted = live.keys() if within is None else live.keys() & set(within)
        unknown = self._unknown_of(wanted, live)
        if len(unknown) >= PACK:
            for commit in self._packs.read():
                if live.get(commit.unit) == commit.generation:
                    self._known[commit.unit] = commit
            unknown = self._unknown_of(wanted, live)
        list(in_threads(lambda unit: self._fetch_if_there(unit, live[unit]), unknown, threads=FETCHES))
        known = {unit: self._known_of(unit, live[unit]) for unit in wanted}
        commits = {unit: commit for unit, commit in known.items() if commit is not None}
        if len(unknown) >= PACK:
            self._packs.write([commits[unit] for unit in unknown if unit in commits])
        return Snapshot(tuple(commits.values()))

    def remember(self, commit: Commit) -> None:
        """Take note of a commit that ``publish`` has returned, here or elsewhere: its record need not be fetched."""
        self._known[commit.unit] = commit
        self._unpacked.append(commit)

    def pack(self) -> None:
        """Pack what was remembered, where that is enough for a pack."""
        if len(self._unpacked) >= PACK:
            count = len(self._unpacked)  # another thread may add to them meanwhile
            self._packs.write(self._unpacked[:count])
            del self._unpacked[:count]

    def find(self, unit: str) -> Commit | None:
        """The commit of a unit that counts now, looked up by name instead of by listing; None if there is none."""
        generation = self._live_generation(unit)
        commit = self._fetch_if_there(unit, generation)
        return None if self._is_damaged(unit, generation) else commit

    def publish(self, own: Commit) -> Commit:
        """Create the record of a commit; returns the one that counts, which another attempt may have created."""
        for generation in count():
            mine = replace(own, generation=generation)
            is_first = self._store.put_new(f"commits/{_name(own.unit, generation)}", mine.to_json())
            tell_of_change(self._store)  # also where the record was there: its writer may have died before this
            winner = mine if is_first else self._fetch(own.unit, generation)
            # asked last, since it may have been taken out between any two of our requests
            if winner is not None and not self._is_damaged(own.unit, generation):
                return winner
        raise AssertionError("there is always another generation")

    def mark_damaged(self, commit: Commit, damage: DamagedError) -> bool:
        """Take a commit out of the set, unless it is out of it; returns whether this call did."""
        path = f"commits/{_name(commit.unit, commit.generation)}"
        try:
            recorded = self._parsed(path)
        except FileNotFoundError:
            return False
        except ValueError as error:
            damage = self._not_a_record(path, error)
        else:
            if recorded.parts != commit.parts:  # another attempt came before it, or the set that was here is gone
                self._known.pop(commit.unit, None)
                return False
        return self._take_out(commit.unit, commit.generation, damage)

    def reason(self, unit: str) -> DamageRecord | None:
        """The newest record of damage of a unit, or None; a record that is damaged itself counts all the same."""
        generation = self._live_generation(unit) - 1
        if generation < 0:
            return None
        path = f"quarantine/{_name(unit, generation)}"
        try:
            return DamageRecord.from_json(self._store.get(path, at_most=RECORD_BYTES))
        except ValueError as error:
            return DamageRecord(unit=unit, generation=generation, path=path, reason=f"is damaged: {error}")

    def _live(self) -> tuple[dict[str, int], set[str]]:
        """The generation of each committed unit, and the units that were ever marked damaged."""
        commits = list(self._names("commits"))  # first, so that what is marked damaged meanwhile is left out
        quarantines = set(self._names("quarantine"))
        quarantined = {unit for unit, _ in quarantines}
        first_free = {unit: next(g for g in count() if (unit, g) not in quarantines) for unit in quarantined}
        return {unit: generation for unit, generation in commits if generation == first_free.get(unit, 0)}, quarantined

    def _names(self, folder: str) -> Iterator[tuple[str, int]]:
        """Unit and generation of each record; names of another form are not ours and are ignored."""
        for path in self._store.list(folder):
            match = _RECORD_NAME.fullmatch(path, len(folder) + 1)
            if match:
                yield match["unit"], int(match["generation"] or 0)

    def _live_generation(self, unit: str) -> int:
        return next(generation for generation in count() if not self._is_damaged(unit, generation))

    def _is_damaged(self, unit: str, generation: int) -> bool:
        return self._store.exists(f"quarantine/{_name(unit, generation)}")

    def _unknown_of(self, wanted: Set[str], live: Mapping[str, int]) -> list[str]:
        return sorted(unit for unit in wanted if self._known_of(unit, live[unit]) is None)

    def _known_of(self, unit: str, generation: int) -> Commit | None:
        commit = self._known.get(unit)
        return commit if commit is not None and commit.generation == generation else None

    def _fetch_if_there(self, unit: str, generation: int) -> Commit | None:
        try:
            return self._fetch(unit, generation)
        except FileNotFoundError:
            return None

    def _fetch(self, unit: str, generation: int) -> Commit | None:
        """The commit of that name; None if the object is not a commit, and then it is marked damaged."""
        known = self._known_of(unit, generation)
        if known is not None:
            return known
        path = f"commits/{_name(unit, generation)}"
        try:
            commit = self._parsed(path)
            if (commit.unit, commit.generation) != (unit, generation):
                raise ValueError(f"it is of unit {commit.unit}, generation {commit.generation}")
        except ValueError as error:
            self._take_out(unit, generation, self._not_a_record(path, error))
            return None
        self._known[unit] = commit
        return commit

    def _parsed(self, path: str) -> Commit:
        try:
            return self._parsed_once(path)
        except ValueError:
            return self._parsed_once(path)  # bytes that were damaged only on their way arrive whole now

    def _parsed_once(self, path: str) -> Commit:
        return Commit.from_json(self._store.get(path, at_most=RECORD_BYTES))

    def _take_out(self, unit: str, generation: int, damage: DamagedError) -> bool:
        self._check()
        record = DamageRecord(unit=unit, generation=generation, path=damage.path, reason=damage.reason)
        is_first = self._store.put_new(f"quarantine/{_name(unit, generation)}", record.to_json())
        tell_of_change(self._store)
        if is_first:
            logger.warning("unit %s is damaged and has to be made again: %s", unit, damage)
        return is_first

    def _not_a_record(self, path: str, error: ValueError) -> DamagedError:
        return DamagedError(self._store.uri, path, f"is not the record of a commit: {error}")


def _name(unit: str, generation: int) -> str:
    return f"{unit}@{generation}.json" if generation else f"{unit}.json"
