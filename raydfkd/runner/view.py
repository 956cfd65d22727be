"""A view of a transfer set for judging, showing and reporting it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from functools import cached_property

import torch

from raydfkd.data.commits import Commit, Snapshot
from raydfkd.data.shards import StoredRows
from raydfkd.job import Job
from raydfkd.store.errors import DamagedError, StoreError


class SetView:
    """A job's set at one moment; units that turn out to be damaged are taken out of the set and left out here."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._damaged: set[str] = set()

    @cached_property
    def snapshot(self) -> Snapshot:
        """The commits of the job's units at the first look."""
        return self._job.snapshot()

    @property
    def missing(self) -> set[str]:
        """Units of the plan that are not there, or were found damaged meanwhile."""
        return set(self._job.unit_ids).difference(self.snapshot.units) | self._damaged

    def rows(self, within: Collection[str] | None = None) -> Iterator[StoredRows]:
        """Yield the first part of each unit, then the second ones, and so on; of units ``within`` if they are given."""
        # Part number before unit, so that a caller who stops early has seen every unit. A unit that turns out damaged
        # half-way is skipped from then on; the parts of it that were yielded before stay with the caller.
        commits = [commit for commit in self.snapshot.commits if within is None or commit.unit in within]
        for number in range(max((len(commit.parts) for commit in commits), default=0)):
            for commit in commits:
                if number < len(commit.parts):
                    rows = self._read(commit, number)
                    if rows is not None:
                        yield rows

    def sample(self, count: int, within: Collection[str] | None = None) -> StoredRows | None:
        """About ``count`` rows, as many of each unit as of any other; None where there is none."""
        # Each part gives at most an equal share of the rows, evenly spaced over it, and the first parts of all units
        # come first; so the parts that follow are read only where the first ones were too short.
        units = [unit for unit in self.snapshot.units if within is None or unit in within]
        each = max(1, count // max(1, len(units)))
        pieces, found = [], 0
        for rows in self.rows(within):
            places = torch.linspace(0, len(rows) - 1, min(each, len(rows))).round().long()
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

    def _read(self, commit: Commit, number: int) -> StoredRows | None:
        if commit.unit in self._damaged:
            return None
        try:
            return self._job.transfer_set.read(commit.parts[number])
        except DamagedError as damage:
            with contextlib.suppress(StoreError):  # a reader may have no access to write
                self._job.transfer_set.mark_damaged(commit, damage)
            self._damaged.add(commit.unit)
            return None
