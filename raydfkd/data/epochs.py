"""Snapshots that the epochs of a training go over; a training that resumes after a kill gets the same ones."""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from pydantic import TypeAdapter

from raydfkd.data.commits import RECORD, RECORD_BYTES, Snapshot, parse_record
from raydfkd.data.news import Watch
from raydfkd.data.transfer_set import TransferSet
from raydfkd.store.store import Store
from raydfkd.units import plan_name

T = TypeVar("T")
logger = logging.getLogger(__name__)


class EpochPlanner:
    """Chooses the snapshots that a student's epochs go over; asked on one rank.

    Args:
        transfer_set: where the images are.
        wanted_images: how many images the snapshot of an epoch that begins after so many steps must have.
        refresh_steps: steps after which an epoch may end for a newer snapshot; None for never.
        units: the units to train on; only their commits are seen.
        planned_images: images of all of them.
        plan: names the plan that they are of; whether the set is closed for it.
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
        plan: str,
        log: EpochLog | None = None,
    ) -> None:
        self._transfer_set = transfer_set
        self._wanted_images = wanted_images
        self._refresh_steps = refresh_steps
        self._units = units
        self._planned_images = planned_images
        self._plan = plan
        self._watch = Watch(transfer_set.store, lambda: transfer_set.snapshot(within=units))
        self._snapshot = Snapshot(())
        self._is_closed = False
        self._log = log

    def begin(self, number: int, step: int) -> Snapshot | None:
        """The snapshot of epoch ``number`` if it begins after ``step`` steps; None if there are too few images yet."""
        newest = self._newest(step)
        if newest is None:
            return None
        _, earlier = self._recorded(number, newest)
        return earlier or self._begun(number, step, newest)

    def wanted(self, step: int) -> int:
        """Images that the epoch that was just begun, after ``step`` steps, should have: all, where none are to come."""
        return self._planned_images if self._is_closed else self._wanted_images(step)

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
        if this is not None and self._log is not None and step <= self._log.kept_until(number, this):
            return None
        if newest.units != snapshot.units:
            return self._begun(number + 1, step, newest)
        if this is not None and self._log is not None:
            self._log.keep(number, this, until=step)
        return None

    def is_intact(self, snapshot: Snapshot) -> bool:
        """Whether every commit of ``snapshot`` is still in the set, none marked damaged since."""
        there = {commit.unit: commit.parts for commit in self._transfer_set.snapshot(within=self._units).commits}
        return all(there.get(commit.unit) == commit.parts for commit in snapshot.commits)

    def _recorded(self, number: int, newest: Snapshot) -> tuple[Epoch | None, Snapshot | None]:
        """The record of an epoch and its snapshot; neither unless all its units are there."""
        record = self._log.read(number) if self._log is not None else None
        if record is None or record.plan != self._names[0]:
            return None, None
        units = self._unpacked(record.units)
        snapshot = Snapshot(tuple(commit for commit in newest.commits if commit.unit in units))
        return (record, snapshot) if len(snapshot.commits) == len(units) else (None, None)

    def _begun(self, number: int, step: int, newest: Snapshot) -> Snapshot:
        if self._log is not None and newest.images < self._planned_images:  # else nothing is left to choose
            self._log.write(number, Epoch(first_step=step, plan=self._names[0], units=self._packed(newest.units)))
        return newest

    def _newest(self, step: int) -> Snapshot | None:
        is_complete = self._snapshot.images >= self._planned_images  # and then only damage is news
        # before the listing, which then cannot miss a last commit
        self._is_closed = is_complete or self._transfer_set.is_closed(self._plan)
        news = self._watch.news()
        if news is not None:
            self._snapshot = news
        return self._snapshot if self._is_closed or self._snapshot.images >= self._wanted_images(step) else None

    @cached_property
    def _names(self) -> tuple[str, tuple[str, ...]]:
        """The units' name as a plan, and their ids in order."""
        return plan_name(self._units), tuple(sorted(self._units))

    def _packed(self, units: Collection[str]) -> str:
        chosen = frozenset(units)
        bits = np.fromiter((unit in chosen for unit in self._names[1]), bool)
        return base64.b64encode(np.packbits(bits).tobytes()).decode()

    def _unpacked(self, bits: str) -> frozenset[str]:
        packed = np.frombuffer(base64.b64decode(bits), np.uint8)
        return frozenset(unit for unit, bit in zip(self._names[1], np.unpackbits(packed).tolist(), strict=False) if bit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """The record of an epoch: when it began, and over which units."""

    __pydantic_config__ = RECORD

    first_step: int
    """Steps of the training before it."""
    plan: str
    """Names the units that could have been in it, as ``plan_name`` does."""
    units: str
    """Those of them that it goes over: a bit for each in order of their ids, in base64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """The record of the decision to keep an epoch's snapshot."""

    __pydantic_config__ = RECORD

    first_step: int
    """Of the epoch."""
    until: int
    """Step of the training at which it was last decided."""


class EpochLog:
    """The epochs of one training: a small object when one begins, and a tiny one when it is decided to keep it.

    A training that resumes repeats the steps after its checkpoint. The same images come again only if the snapshots
    that it chose after the checkpoint, while the set grew, can be looked up.

    Args:
        store: a folder that all training workers share.
        training: names the training.
    """

    def __init__(self, store: Store, training: str) -> None:
        self._store = store
        self._folder = f"epochs-{training[:16]}"

    def write(self, number: int, record: Epoch) -> None:
        """Write the record of epoch ``number``, replacing an earlier one."""
        self._store.put(self._path(number), _EPOCH.dump_json(record))

    def read(self, number: int) -> Epoch | None:
        """The record of epoch ``number``; None if there is none, or none that can be read: it is chosen anew then."""
        return self._read(self._path(number), _EPOCH)

    def keep(self, number: int, record: Epoch, *, until: int) -> None:
        """Write down that epoch ``number``, of that ``record``, was kept at step ``until``."""
        self._store.put(self._path(number, "kept"), _KEPT.dump_json(_Kept(first_step=record.first_step, until=until)))

    def kept_until(self, number: int, record: Epoch) -> int:
        """Step at which epoch ``number``, of that ``record``, was last kept; its first if it never was."""
        kept = self._read(self._path(number, "kept"), _KEPT)
        return kept.until if kept is not None and kept.first_step == record.first_step else record.first_step

    def forget(self) -> None:
        """Remove every record: the training begins anew, and its epochs are chosen anew."""
        for path in self._store.list(self._folder):
            self._store.delete(path)

    def _read(self, path: str, adapter: TypeAdapter[T]) -> T | None:
        try:
            return parse_record(adapter, self._store.get(path, at_most=RECORD_BYTES))
        except FileNotFoundError:
            return None
        except ValueError as error:
            uri = self._store.uri
            logger.warning("%s/%s is not the record of an epoch (%s); images are chosen anew", uri, path, error)
            return None

    def _path(self, number: int, kind: str = "begun") -> str:
        return f"{self._folder}/{number:06d}.{kind}.json"


_EPOCH = TypeAdapter(Epoch)
_KEPT = TypeAdapter(_Kept)
