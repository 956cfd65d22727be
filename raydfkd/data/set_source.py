"""Batches from a transfer set that may still be growing."""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from raydfkd.config.schema import Fraction, Positive
from raydfkd.data.background import ahead
from raydfkd.data.commits import Part, Snapshot
from raydfkd.data.epochs import EpochPlanner
from raydfkd.data.shards import StoredRows
from raydfkd.data.shuffle_buffer import Piece, ShuffleBuffer
from raydfkd.data.sources import SOURCES, Feed, StudentBatch
from raydfkd.seeds import derive_seed, rng_from
from raydfkd.store.errors import DamagedError, StoreError

logger = logging.getLogger(__name__)
POLL_S = 0.25
LOGIT_BYTES = 2
AHEAD = 4
"""Batches that are made ahead of their use."""
BUFFER_BYTES = 2**30
"""Maximum of bytes of pixels in a shuffle buffer, and of logits: 7,133 rows of 3x224x224, all 65,536 up to 3x73x73, and
those of up to 8,192 classes."""


class TransferSetSource:
    """Epochs over pinned snapshots of a transfer set; each epoch sees every committed row once across all ranks.

    An epoch shuffles the snapshot's parts and cuts them into shuffle buffers of about ``window_rows`` rows. Within a
    buffer each rank takes a contiguous range, reads only the parts it lies in, shuffles it and splits it into as many
    batches as every other rank, so that all make the same number of steps. A step has at most ``batch_size`` images
    over all ranks, and the steps of a buffer differ by one image at most. The order follows from seed, epoch and
    snapshot.

    Batches are made ahead of their use on a thread, and the next buffer is read on another one; ``state_dict`` counts
    the batches that were handed out. Up to two buffers of images and a few batches are held in memory.

    Before each epoch the newest snapshot is taken. A student that is ahead of the synthesis waits: it starts with
    ``wait_for`` images, and after a share s of its steps wants the share s / ``complete_by`` of the planned images.
    With ``refresh_steps`` an epoch ends early, after that many steps or a multiple of them, if a newer snapshot is good
    enough by then. It does not wait for one, and nothing is left over from the epoch that ended.

    So images mix by one rule: an epoch, ended early or not, is the beginning of a shuffle of all images that were
    committed when it began, old and new ones at equal odds. A new image is as likely to be next as any other within
    ``refresh_steps``, none is forgotten, and once the set is complete every epoch sees each image once.

    A source that resumes from a checkpoint repeats the steps after it with the same batches: epochs that were begun
    while the set grew are looked up in ``feed.epochs``.

    Units that turn out to be damaged are taken out of the set, and the next epoch is over the others. In the epoch that
    found them other images of the same buffer come a second time in their place, so that all ranks make the steps that
    they would have made, and nobody need be told.

    Args:
        feed: what the engine supplies.
        wanted_images: how many images the snapshot of an epoch that begins after so many steps must have.
        refresh_steps: steps after which an epoch may end for a newer snapshot; None for never.
        window_rows: maximum of rows in a shuffle buffer, to a part; of large images there are fewer, see
            ``BUFFER_BYTES``.
    """

    is_live: ClassVar[bool] = False

    def __init__(
        self, feed: Feed, *, wanted_images: Callable[[int], int], refresh_steps: int | None, window_rows: int
    ) -> None:
        self._transfer_set = feed.transfer_set
        self._planner = EpochPlanner(
            feed.transfer_set,
            wanted_images,
            refresh_steps=refresh_steps,
            units=feed.units,
            planned_images=feed.planned_images,
            plan=feed.plan,
            log=feed.epochs,
        )
        self._batch_size = feed.batch_size
        largest = max(feed.image_bytes, LOGIT_BYTES * feed.num_classes)  # of a row's columns
        self._window_rows = max(min(window_rows, BUFFER_BYTES // largest), feed.batch_size)
        self._seed = feed.seed
        self._rank, self._world_size = feed.ranks.rank, feed.ranks.size
        self._agree = feed.ranks.agree
        self._pin_memory = feed.pin_memory
        self._held: dict[str, StoredRows] = {}
        self._unreadable: set[str] = set()
        self._num_unreadable = self._wanted = 0
        self._step = 0
        self._epoch = 0
        self._step_in_epoch = 0
        self._snapshot: Snapshot | None = None
        self._is_restored = False

    def __iter__(self) -> Iterator[StudentBatch]:
        """Batches without end; none at all if synthesis has ended without an image."""
        # One iteration is an epoch, or the rest of the one that a checkpoint is in. The epoch ends with its batches,
        # or earlier where the ranks agree on a newer snapshot (then pinned already) or a part turns out damaged.
        while True:
            snapshot = self._pinned()
            if not snapshot.images:
                return
            if snapshot.images < self._world_size:
                raise ValueError(f"{snapshot.images} images cannot be shared by {self._world_size} training workers")
            if self._step_in_epoch == 0:
                self._wanted, self._num_unreadable = self._planner.wanted(self._step), 0
            with closing(self._batches(snapshot)) as batches:
                while (newer := self._newer_than(snapshot)) is None and (batch := next(batches, None)) is not None:
                    self._step += 1
                    self._step_in_epoch += 1
                    there = snapshot.images - self._num_unreadable
                    yield replace(batch, snapshot_images=there, wanted_images=self._wanted)
            self._epoch += 1
            self._step_in_epoch = 0
            self._snapshot = newer

    def state_dict(self) -> dict[str, Any]:
        """The step, the epoch, the position in it and the pinned snapshot."""
        return {
            "step": self._step,
            "epoch": self._epoch,
            "step_in_epoch": self._step_in_epoch,
            "wanted": self._wanted,
            "snapshot": None if self._snapshot is None else base64.b64encode(self._snapshot.packed).decode(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from ``state``; with another epoch where its snapshot is of another version of this engine."""
        self._step, self._epoch, self._step_in_epoch = state["step"], state["epoch"], state["step_in_epoch"]
        self._wanted = state.get("wanted", 0)  # which earlier versions did not keep
        self._snapshot, self._is_restored = None, False
        if state["snapshot"] is not None:
            try:
                self._snapshot = Snapshot.unpacked(base64.b64decode(state["snapshot"]))
                self._is_restored = True
            except ValueError:
                self.start_over()

    def start_over(self) -> None:
        """Begin another epoch, over the snapshot of that moment; every rank does so at once."""
        self._epoch += 1
        self._step_in_epoch = 0
        self._snapshot, self._is_restored = None, False

    def finish(self) -> None:
        """Nothing is left to do."""

    def _pinned(self) -> Snapshot:
        """The snapshot of this epoch, the same on every rank; waits until there is one.

        Ranks agree at every poll rather than at the end, because a collective that waits for hours times out.
        """
        if self._is_restored:
            self._is_restored = False
            assert self._snapshot is not None
            is_good = self._rank == 0 and self._planner.is_intact(self._snapshot)
            self._snapshot = self._agree(self._snapshot if is_good else None)
            if self._snapshot is None:
                self.start_over()
        is_asked = self._rank == 0
        while self._snapshot is None:
            self._snapshot = self._agree(self._planner.begin(self._epoch, self._step) if is_asked else None)
            if self._snapshot is None:
                time.sleep(POLL_S)
        return self._snapshot

    def _newer_than(self, snapshot: Snapshot) -> Snapshot | None:
        """The next epoch's snapshot if this epoch ends here, before its time, else None; the same on every rank."""
        if not self._planner.is_due(snapshot, self._step_in_epoch):
            return None
        is_asked = self._rank == 0
        return self._agree(self._planner.end_early(self._epoch, self._step, snapshot) if is_asked else None)

    def _batches(self, snapshot: Snapshot) -> Generator[StudentBatch]:
        """This epoch's batches from where it stands, made ahead of their use."""
        return ahead(self._remaining(snapshot, self._step_in_epoch), depth=AHEAD)

    def plan(self, snapshot: Snapshot) -> list[Share]:
        """This rank's share of each shuffle buffer of this epoch over ``snapshot``, in order; reads nothing."""
        return [self._share_of(parts, number) for number, parts in enumerate(self._buffers(snapshot))]

    def _buffers(self, snapshot: Snapshot) -> list[list[Part]]:
        """The parts in this epoch's order, cut where a buffer is full.

        A rest too small for a batch joins the buffer before it: it would make a step of a few images, and none at all
        on some ranks.
        """
        parts = [part for commit in snapshot.commits for part in commit.parts]
        order = torch.randperm(len(parts), generator=self._rng("parts")).tolist()
        windows: list[list[Part]] = [[]]
        rows = 0
        for index in order:
            if rows >= self._window_rows:
                windows.append([])
                rows = 0
            windows[-1].append(parts[index])
            rows += parts[index].rows
        if len(windows) > 1 and rows < self._batch_size:
            rest = windows.pop()
            windows[-1] += rest
        return windows

    def _remaining(self, snapshot: Snapshot, skip: int) -> Generator[StudentBatch]:
        """This epoch's batches but for the first ``skip``; runs on another thread than the steps are counted on."""
        # Shares are planned from row counts alone, so that buffers that were used up are skipped unread.
        # Then one thread reads buffer after buffer while the batches of the one before are taken from memory.
        shares, first_steps = [], []
        for share in self.plan(snapshot):
            if skip < share.split.steps:
                shares.append(share)
                first_steps.append(skip)
            skip = max(0, skip - share.split.steps)
        with closing(ahead(self._read_all(shares, snapshot), depth=1)) as windows:
            for (window, order), share, first in zip(windows, shares, first_steps, strict=True):
                for step in range(first, share.split.steps):
                    yield self._batch(window, order, share.split, step, snapshot.images)

    def _share_of(self, parts: list[Part], number: int) -> Share:
        total = sum(part.rows for part in parts)
        steps = max(1, min(-(-total // self._batch_size), total // self._world_size))
        split = Split(total=total, steps=steps, ranks=self._world_size)
        begin, end = split.first_row(self._rank), split.first_row(self._rank + 1)
        pieces, first = [], 0
        for part in parts:
            low, high = max(begin, first), min(end, first + part.rows)
            if low < high:
                pieces.append(Piece(part, low - first, high - first))
            first += part.rows
        return Share(number=number, pieces=pieces, split=split)

    def _read_all(self, shares: list[Share], snapshot: Snapshot) -> Generator[tuple[ShuffleBuffer, Tensor]]:
        """For each share its rows and their order; rows that cannot be read have others in their place."""
        for share in shares:
            window = self._window(share, snapshot)
            self._held = window.parts
            count = share.split.first_row(self._rank + 1) - share.split.first_row(self._rank)
            order = torch.randperm(count, generator=self._rng("rows", share.number, self._rank))
            yield window, order % len(window)

    def _window(self, share: Share, snapshot: Snapshot) -> ShuffleBuffer:
        read = partial(self._read, snapshot)
        window = ShuffleBuffer(share.pieces, read, held=self._held)
        if len(window):
            return window
        others = [part for commit in snapshot.commits for part in commit.parts if part.path not in self._unreadable]
        for index in torch.randperm(len(others), generator=self._rng("others", share.number, self._rank)).tolist():
            window = ShuffleBuffer([Piece(others[index], 0, others[index].rows)], read, held=self._held)
            if len(window):
                return window
        raise self._nothing_left(snapshot)

    def _read(self, snapshot: Snapshot, part: Part) -> StoredRows | None:
        """A part of ``snapshot``; None where it is damaged, and then its unit is taken out of the set."""
        try:
            return self._transfer_set.read(part)
        except DamagedError as damage:
            self._mark_damaged(damage, snapshot)
            return None

    def _nothing_left(self, snapshot: Snapshot) -> StoreError:
        uri, count = self._transfer_set.store.uri, snapshot.images
        return StoreError(f"{uri}: none of the {count:,} images that an epoch began with can be read any more")

    def _mark_damaged(self, damage: DamagedError, snapshot: Snapshot) -> None:
        """Take the unit that cannot be read out of the set."""
        commit = next(commit for commit in snapshot.commits if damage.path in [part.path for part in commit.parts])
        self._unreadable.add(damage.path)
        self._num_unreadable += next(part.rows for part in commit.parts if part.path == damage.path)
        self._transfer_set.mark_damaged(commit, damage)
        logger.info("the student trains on without unit %s", commit.unit)

    def _batch(
        self, window: ShuffleBuffer, order: Tensor, split: Split, step: int, snapshot_images: int
    ) -> StudentBatch:
        first, end = split.taken(step, self._rank), split.taken(step + 1, self._rank)
        rows = window.take(order[first:end], pin_memory=self._pin_memory)
        return StudentBatch(
            images=rows.images,
            labels=rows.labels,
            teacher_logits=rows.teacher_logits,
            share=(end - first) * self._world_size / split.size(step),
            snapshot_images=snapshot_images,
        )

    def _rng(self, *parts: object) -> torch.Generator:
        return rng_from(derive_seed(self._seed, self._epoch, *parts))


@SOURCES.register("growing")
class GrowingSource(TransferSetSource):
    """Trains on the images that are committed so far, while the set grows.

    Args:
        wait_for: images that must be committed before the first step.
        complete_by: share of the student's steps that may pass before the set is complete; before that the student
            keeps pace with the synthesis, so that its last steps see every image.
        refresh_steps: steps after which a newer snapshot is taken although the epoch over the old one has not ended;
            unless given, only between epochs.
        window_rows: rows that are shuffled together, fewer where their pixels or logits would be more than 1 GiB; a
            training worker holds two of these buffers over the number of workers.
    """

    def __init__(
        self,
        feed: Feed,
        *,
        wait_for: Positive = 1,
        complete_by: Fraction = 0.5,
        refresh_steps: Positive | None = None,
        window_rows: Positive = 65536,
    ) -> None:
        super().__init__(
            feed,
            wanted_images=keeping_pace(feed, wait_for=wait_for, complete_by=complete_by),
            refresh_steps=refresh_steps,
            window_rows=window_rows,
        )


def keeping_pace(feed: Feed, *, wait_for: int, complete_by: float) -> Callable[[int], int]:
    """Images that are wanted after so many steps: all of them once the share ``complete_by`` of the steps is made."""

    def wanted_images(step: int) -> int:
        share = 1.0
        if step < complete_by * feed.steps:
            share = step / (complete_by * feed.steps)
        return min(feed.planned_images, max(wait_for, int(share * feed.planned_images)))

    return wanted_images


@SOURCES.register("snapshot")
class SnapshotSource(TransferSetSource):
    """Waits for the whole set, then trains on it: repeats exactly, since it does not matter when units arrived.

    Args:
        window_rows: rows that are shuffled together, fewer where their pixels or logits would be more than 1 GiB; a
            training worker holds two of these buffers over the number of workers.
    """

    def __init__(self, feed: Feed, *, window_rows: Positive = 65536) -> None:
        super().__init__(feed, wanted_images=lambda _: feed.planned_images, refresh_steps=None, window_rows=window_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The rows of a shuffle buffer, split into steps as equal as can be, and each step among the ranks.

    A rank's rows of all steps lie side by side, so that it reads few parts.
    """

    total: int
    """Rows of the buffer."""
    steps: int
    """Steps that every rank makes of it."""
    ranks: int

    def size(self, step: int) -> int:
        """Images of a step over all ranks; the least, or one more."""
        return self.total * (step + 1) // self.steps - self.total * step // self.steps

    def taken(self, step: int, rank: int) -> int:
        """Rows of a rank in the steps before ``step``; what is left over in each step goes round among the ranks."""
        least = self.total // self.steps
        larger = self.total * step // self.steps - step * least  # so many of the steps have a row more
        each, left_over = 0, 0
        for count, images in ((larger, least + 1), (step - larger, least)):
            each += count * (images // self.ranks)
            left_over += count * (images % self.ranks)
        return each + (left_over + self.ranks - 1 - rank) // self.ranks

    def first_row(self, rank: int) -> int:
        """Number of the buffer's row at which a rank's begin; of the rank after the last, the rows of all."""
        return sum(self.taken(self.steps, other) for other in range(rank))


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One rank's part of a shuffle buffer."""

    number: int
    """Number of the buffer in the epoch."""
    pieces: list[Piece]
    split: Split
