"""Snapshots that the epochs of a training go over; a training that resumes after a kill gets the same ones."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from pydantic import TypeAdapter

from raydfkd.data.commits import RECORD, Snapshot, parse_record
from raydfkd.data.transfer_set import TransferSet
from raydfkd.store.store import Store


class EpochPlanner:
    """Chooses the snapshots that a student's epochs go over; asked on one rank.

    Args:
        transfer_set: where the images are.
        wanted_images: how many images the snapshot of an epoch that begins after so many steps must have.
        refresh_steps: steps after which an epoch may end for a newer snapshot; None for never.
        units: the plan; only its commits are seen.
        planned_images: images of the whole plan.
        log: where choices are noted and looked up; unless given, a training that resumes chooses again.
    """

    def __init__(
        self,
        transfer_set: TransferSet,
        wanted_images: Callable[[int], int],
        *,
        refresh_steps: int | None,
        units: Collection[str],
        planned_images: int,
        log: EpochLog | None = None,
    ) -> None:
        self._transfer_set = transfer_set
        self._wanted_images = wanted_images
        self._refresh_steps = refresh_steps
        self._units = units
        self._planned_images = planned_images
        self._complete: Snapshot | None = None
        self._log = log

    def begin(self, number: int, step: int) -> Snapshot | None:
        """The snapshot of epoch ``number`` if it begins after ``step`` steps; None if there are too few images yet."""
        newest = self._newest(step)
        if newest is None:
            return None
        _, earlier = self._recorded(number, newest)
        return earlier or self._begun(number, step, newest)

    def is_due(self, snapshot: Snapshot, step_in_epoch: int) -> bool:
        """Whether to ask ``end_early`` after as many steps of an epoch over ``snapshot``; the same on every rank."""
        every = self._refresh_steps
        if every is None or snapshot.images >= self._planned_images:
            return False
        return step_in_epoch > 0 and step_in_epoch % every == 0

    def end_early(self, number: int, step: int, snapshot: Snapshot) -> Snapshot | None:
        """The next epoch's snapshot if epoch ``number`` over ``snapshot`` ends after ``step`` steps, else None.

        It ends for a newer snapshot that is good enough. A training that resumes and repeats this step decides as it
        did before.
        """
        # What the log says of this step is repeated: the next epoch began here, or this one was kept beyond it.
        # At a step that was never decided on, a snapshot with other units ends it; either decision is written down.
        newest = self._newest(step)
        if newest is None:
            return None
        following, earlier = self._recorded(number + 1, newest)
        if following is not None:
            return earlier if following.first_step == step else None
        this, _ = self._recorded(number, newest)
        if this is not None and step <= this.kept_until:
            return None
        if newest.units != snapshot.units:
            return self._begun(number + 1, step, newest)
        if self._log is not None and this is not None:
            self._log.write(number, replace(this, kept_until=step))
        return None

    def is_intact(self, snapshot: Snapshot) -> bool:
        """Whether every commit of ``snapshot`` is still in the set, none marked damaged since."""
        there = {commit.unit: commit.parts for commit in self._transfer_set.snapshot(within=self._units).commits}
        return all(there.get(commit.unit) == commit.parts for commit in snapshot.commits)

    def _recorded(self, number: int, newest: Snapshot) -> tuple[Epoch | None, Snapshot | None]:
        """The record of an epoch and its snapshot; neither unless all its units are there."""
        record = self._log.read(number) if self._log is not None else None
        if record is None:
            return None, None
        units = frozenset(record.units)
        snapshot = Snapshot(tuple(commit for commit in newest.commits if commit.unit in units))
        return (record, snapshot) if len(snapshot.commits) == len(units) else (None, None)

    def _begun(self, number: int, step: int, newest: Snapshot) -> Snapshot:
        if self._log is not None and newest.images < self._planned_images:  # else nothing is left to choose
            self._log.write(number, Epoch(first_step=step, units=newest.units, kept_until=step))
        return newest

    def _newest(self, step: int) -> Snapshot | None:
        if self._complete is not None:  # looked at again only where a part of it turns out to be damaged
            return self._complete
        closed = self._transfer_set.is_closed()  # before the listing, which then cannot miss a last commit
        snapshot = self._transfer_set.snapshot(within=self._units)
        if snapshot.images >= self._planned_images:
            self._complete = snapshot
        return snapshot if closed or snapshot.images >= self._wanted_images(step) else None

    def look_again(self) -> None:
        """Forget that the set was complete, because a part of it is damaged."""
        self._complete = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """The record of an epoch: when it began, over which units, and how long it was kept."""

    __pydantic_config__ = RECORD

    first_step: int
    """Steps of the training before it."""
    units: tuple[str, ...]
    """Units that it goes over."""
    kept_until: int
    """Step of the training at which it was last decided to keep this epoch's snapshot."""


class EpochLog:
    """The epochs of one training, one small object each.

    A training that resumes repeats the steps after its checkpoint. The same images come again only if the snapshots
    that it chose after the checkpoint, while the set grew, can be looked up.

    Args:
        store: a folder that all training workers share.
        training: names the training.
    """

    def __init__(self, store: Store, training: str) -> None:
        self._store = store
        self._folder = f"passes-{training[:16]}"

    def write(self, number: int, record: Epoch) -> None:
        """Write the record of epoch ``number``, replacing an earlier one."""
        self._store.put(self._path(number), _EPOCH.dump_json(record))

    def read(self, number: int) -> Epoch | None:
        """The record of epoch ``number``; None if there is none.

        Raises:
            ValueError: the object is not such a record.
        """
        try:
            data = self._store.get(self._path(number))
        except FileNotFoundError:
            return None
        try:
            return parse_record(_EPOCH, data)
        except ValueError as error:
            raise ValueError(f"{self._store.uri}/{self._path(number)} is not the record of an epoch: {error}") from None

    def _path(self, number: int) -> str:
        return f"{self._folder}/{number:06d}.json"


_EPOCH = TypeAdapter(Epoch)
