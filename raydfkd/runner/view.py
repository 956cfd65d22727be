"""A view of a transfer set for judging, showing and reporting it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from functools import cached_property
from zlib import crc32

import torch

from raydfkd.data.commits import Commit, Snapshot
from raydfkd.data.shards import StoredRows
from raydfkd.job import Job
from raydfkd.store.errors import DamagedError, StoreError
from raydfkd.synthesis.build import has_targets

MAX_SAMPLED = 250
"""Units that a sample is taken of: their parts are read whole, and may have 32 MiB each."""


GOLDEN = (5**0.5 - 1) / 2
"""Its multiples are spread evenly between whole numbers, however many of them, and whichever every so many."""


class SetView:
    """A job's set at one moment; units that turn out to be damaged are taken out of the set and left out here."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._damaged: set[str] = set()

    @cached_property
    def snapshot(self) -> Snapshot:
        """The commits of the job's units at the first look."""
        return self._job.snapshot()

    @cached_property
    def max_parts(self) -> int:
        """Parts of the unit that has most."""
        return max((len(commit.parts) for commit in self.snapshot.commits), default=0)

    def classes_of(self, unit: str) -> Collection[int] | None:
        """The classes that a unit's images were made for; None where its plan does not say."""
        planned = self._job.units_by_id.get(unit) if self._has_targets else None
        return None if planned is None else planned.request.classes

    @cached_property
    def _has_targets(self) -> bool:
        return has_targets(self._job.recipe)

    @property
    def missing(self) -> set[str]:
        """Units of the plan that are not there, or were found damaged meanwhile."""
        return set(self._job.unit_ids).difference(self.snapshot.units) | self._damaged

    def rows(self, within: Collection[str] | None = None) -> Iterator[StoredRows]:
        """Yield the first part of each unit, then the second ones, and so on; of units ``within`` if they are given."""
        # Part number before unit, so that a caller who stops early has seen every unit. A unit that turns out damaged
        # half-way is skipped from then on; the parts of it that were yielded before stay with the caller.
        commits = [commit for commit in self.snapshot.commits if within is None or commit.unit in within]
        for number in range(self.max_parts):
            for commit in commits:
                if number < len(commit.parts):
                    rows = self.read(commit, number)
                    if rows is not None:
                        yield rows

    def sample(self, count: int, within: Collection[str] | None = None) -> StoredRows | None:
        """About ``count`` rows, as many of each unit as of any other; None where there is none.

        They are of ``MAX_SAMPLED`` units at most, however large the set is.
        """
        # Each part gives at most an equal share of the rows, evenly spaced over it, and the first parts of all units
        # come first; so the parts that follow are read only where the first ones were too short. Of many units some
        # are asked, in an order that has nothing to do with their classes. The spacing begins elsewhere in each part:
        # those of the same classes have them at the same places, and at no others would classes be seen.
        units = [unit for unit in self.snapshot.units if within is None or unit in within]
        units = (
            sorted(units, key=lambda unit: crc32(unit.encode()))[:MAX_SAMPLED] if len(units) > MAX_SAMPLED else units
        )
        each = max(1, count // max(1, len(units)))
        pieces, found = [], 0
        for number, rows in enumerate(self.rows(frozenset(units))):
            taken = min(each, len(rows))
            places = ((torch.arange(taken, dtype=torch.float64) + number * GOLDEN % 1) * len(rows) / taken).long()
            pieces.append(
                StoredRows(
                    images=rows.images[places], labels=rows.labels[places], teacher_logits=rows.teacher_logits[places]
                )
            )
            found += len(places)
            if found >= count:
                break
        if not pieces:
            return None
        return StoredRows(
            images=torch.cat([piece.images for piece in pieces]),
            labels=torch.cat([piece.labels for piece in pieces]),
            teacher_logits=torch.cat([piece.teacher_logits for piece in pieces]),
        )

    def read(self, commit: Commit, number: int) -> StoredRows | None:
        """Part ``number`` of a unit; None where the unit turns out to be damaged, or has before."""
        if commit.unit in self._damaged:
            return None
        try:
            return self._job.transfer_set.read(commit.parts[number])
        except DamagedError as damage:
            with contextlib.suppress(StoreError):  # a reader may have no access to write
                self._job.transfer_set.mark_damaged(commit, damage)
            self._damaged.add(commit.unit)
            return None
