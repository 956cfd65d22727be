"""Which images each epoch of a training goes over, also for one that goes on after it was killed."""

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
        log: where choices are noted and looked up; unless given, a training that goes on chooses anew.
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
        """What epoch ``number`` goes over if it begins after ``step`` steps; None if there is not enough yet."""
        newest = self._newest(step)
        if newest is None:
            return None
        _, earlier = self._recorded(number, newest)
        return earlier or self._begun(number, step, newest)

    def is_due(self, snapshot: Snapshot, step_in_epoch: int) -> bool:
        """Whether to ask ``end_early`` after as many steps of a epoch over ``snapshot``; the same on every rank."""
        every = self._refresh_steps
        if every is None or snapshot.images >= self._planned_images:
            return False
        return step_in_epoch > 0 and step_in_epoch % every == 0

    def end_early(self, number: int, step: int, snapshot: Snapshot) -> Snapshot | None:
        """What the next epoch goes over if epoch ``number`` over ``snapshot`` ends after ``step`` steps, else None.

        It ends for a newer snapshot that is good enough; and where it was here before, if it ended here then.
        """
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
        """Whether nothing of ``snapshot`` was marked damaged since."""
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
        """A part of what was complete is damaged: the set is incomplete again."""
        self._complete = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """How an epoch began and went on."""

    __pydantic_config__ = RECORD

    first_step: int
    """Steps of the training before it."""
    units: tuple[str, ...]
    """Units that it goes over."""
    kept_until: int
    """Step of the training at which it was last decided that the epoch goes on."""


class EpochLog:
    """The epochs of one training, one small object each.

    A checkpoint says where training stood. What it did after that is repeated when it goes on, and over the same
    images only if what it chose since, while the set grew, can be looked up.

    Args:
        store: a folder that all training workers share.
        training: names the training.
    """

    def __init__(self, store: Store, training: str) -> None:
        self._store = store
        self._folder = f"epochs-{training[:16]}"

    def write(self, number: int, record: Epoch) -> None:
        """Say how epoch ``number`` goes, in place of what was said before."""
        self._store.put(self._path(number), _EPOCH.dump_json(record))

    def read(self, number: int) -> Epoch | None:
        """How epoch ``number`` went; None if nobody said.

        Raises:
            ValueError: what is there is not such a record.
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
