"""How the images of one attempt at a unit get into a transfer set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol
from uuid import uuid4

import pyarrow as pa
import xxhash

from raydfkd.batches import SyntheticBatch
from raydfkd.data.background import OrderedCalls
from raydfkd.data.commits import Commit, Part
from raydfkd.data.encodings import Encoding
from raydfkd.data.shards import GROUP_BYTES, RowsDigest, encode_rows, on_host, write_part
from raydfkd.data.store import Store
from raydfkd.schedule import WorkUnit

logger = logging.getLogger(__name__)

WAITING = 2
"""Batches on the host that may wait to be encoded; the device waits while there are more."""


class Sink(Protocol):
    """Where the images of one attempt at a unit go."""

    def write(self, batch: SyntheticBatch) -> None:
        """Add images; nobody sees them yet."""

    def commit(self, *, seconds: float, curve: Sequence[Mapping[str, float]]) -> Commit:
        """Make all of them visible at once, or none where the unit is committed already; returns what counts."""

    def abandon(self) -> None:
        """Forget them."""


class ParquetSink:
    """Encodes and writes on a thread of its own, while the caller makes the next images.

    A part is written as soon as its rows are there, so that no more than a part and ``WAITING + 2`` batches are held.
    What fails on the thread is raised by the next ``write`` or by ``commit``.

    Args:
        store: of the transfer set.
        unit: what the images are for.
        attempt: at the unit, from 1.
        part_rows: rows of a part at most; large images make parts of fewer rows and about 32 MiB of pixels.
        encoding: of the pixels.
        publish: creates the record of a commit, and returns the one that counts.
    """

    def __init__(
        self,
        store: Store,
        unit: WorkUnit,
        *,
        attempt: int,
        part_rows: int,
        encoding: Encoding,
        publish: Callable[[Commit], Commit],
    ) -> None:
        self._store = store
        self._unit = unit
        self._attempt = attempt
        self._part_rows = part_rows
        self._encoding = encoding
        self._publish = publish
        self._prefix = f"parts/{unit.id}-{attempt}-{uuid4().hex[:8]}"
        self._digest = RowsDigest()
        self._thread = OrderedCalls(waiting=WAITING)
        self._num_buffered = 0
        self._buffer: list[pa.RecordBatch] = []
        self._parts: list[Part] = []
        self._paths: list[str] = []
        self._objective = 0.0
        self._student_version = -1
        self._is_sealed = False

    @property
    def num_buffered(self) -> int:
        """Rows that were written and are too few for a part."""
        return self._num_buffered

    def write(self, batch: SyntheticBatch) -> None:
        """Add images; returns once they are in memory of the host and no more than ``WAITING`` batches wait there.

        Raises:
            ValueError: a tensor of another type or shape than ``SyntheticBatch`` promises.
            Exception: an earlier batch could not be encoded or stored.
        """
        assert not self._is_sealed, "nothing is written after the commit"
        if not len(batch):
            return
        batch = on_host(batch)
        self._objective += batch.objective * len(batch)
        self._student_version = max(self._student_version, batch.student_version)
        part_rows = min(self._part_rows, max(1, GROUP_BYTES // batch.images[0].numel()))
        pieces = []
        while len(batch):
            room = part_rows - self._num_buffered
            piece, batch = _rows(batch, slice(room)), _rows(batch, slice(room, None))
            self._num_buffered = (self._num_buffered + len(piece)) % part_rows
            pieces.append((piece, self._num_buffered == 0))
        self._thread.submit(partial(self._add, pieces))

    def commit(self, *, seconds: float, curve: Sequence[Mapping[str, float]]) -> Commit:
        """Make the images visible, or discard them where another attempt was first; returns the record that counts.

        Raises:
            ValueError: nothing was written.
            Exception: a batch could not be encoded or stored.
        """
        self._thread.drain()
        if self._buffer:
            self._flush()
        images = sum(part.rows for part in self._parts)
        if not images:
            raise ValueError(f"unit {self._unit.id} has no images to commit")
        self._is_sealed = True
        self._thread.stop()
        own = Commit(
            unit=self._unit.id,
            attempt=self._attempt,
            seed=self._unit.request.seed,
            images=images,
            parts=tuple(self._parts),
            content=self._digest.hexdigest(),
            objective=self._objective / images,
            student_version=self._student_version,
            seconds=seconds,
            curve=tuple({name: float(value) for name, value in entry.items()} for entry in curve),
        )
        winner = self._publish(own)
        if winner.parts != own.parts:  # equal where the client repeated a request that had succeeded
            logger.info("unit %s was committed by attempt %d meanwhile", winner.unit, winner.attempt)
            self._discard()
        return winner

    def abandon(self) -> None:
        """Delete what was written; a commit that was tried may have succeeded, and then its parts stay."""
        self._thread.stop()
        if not self._is_sealed:
            self._discard()
            self._parts = []

    def _add(self, pieces: Sequence[tuple[SyntheticBatch, bool]]) -> None:
        """Encode rows; those that fill a part are stored with what came before them."""
        for piece, fills_part in pieces:
            self._digest.update(piece)
            self._buffer.append(
                encode_rows(
                    piece,
                    unit=self._unit.id,
                    seed=self._unit.request.seed,
                    first_index=sum(part.rows for part in self._parts) + _count(self._buffer),
                    encoding=self._encoding,
                )
            )
            if fills_part:
                self._flush()

    def _flush(self) -> None:
        rows, data = _count(self._buffer), write_part(self._buffer)
        path = f"{self._prefix}-{len(self._parts):04d}.parquet"
        self._paths.append(path)  # first, so that a write that fails half-way is deleted too
        self._store.put(path, data)
        self._parts.append(Part(path=path, rows=rows, bytes=len(data), xxh3=xxhash.xxh3_128_hexdigest(data)))
        self._buffer = []

    def _discard(self) -> None:
        for path in self._paths:
            self._store.delete(path)
        self._buffer, self._paths = [], []


def _count(rows: Sequence[pa.RecordBatch]) -> int:
    return sum(len(batch) for batch in rows)


def _rows(batch: SyntheticBatch, rows: slice) -> SyntheticBatch:
    return replace(
        batch, images=batch.images[rows], labels=batch.labels[rows], teacher_logits=batch.teacher_logits[rows]
    )
