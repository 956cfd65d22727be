"""The sink through which the images of one attempt at a unit get into a transfer set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from uuid import uuid4

import pyarrow as pa
import torch
import xxhash
from pydantic import TypeAdapter

from raydfkd.data.background import OrderedCalls
from raydfkd.data.batches import SyntheticBatch
from raydfkd.data.commits import GROUP_BYTES, Commit, Part
from raydfkd.data.encodings import Encoding
from raydfkd.data.shards import RowsDigest, encode_rows, on_host, write_part
from raydfkd.store.store import Store
from raydfkd.units import WorkUnit

logger = logging.getLogger(__name__)
_PARTS = TypeAdapter(list[Part])
WAITING = 2
"""Batches on the host that may wait to be encoded; the device waits while there are more."""


class ParquetSink:
    """Encodes and writes on a thread of its own, while the caller makes the next images.

    A part is written as soon as its rows are there, so that no more than a part and ``WAITING + 2`` batches are held.
    An error on the thread is raised by the next ``write`` or by ``commit``.

    Args:
        store: of the transfer set.
        unit: what the images are for.
        attempt: at the unit, from 1.
        part_rows: maximum of rows in a part; large images make parts of fewer rows and about 32 MiB of pixels.
        encoding: of the pixels and logits.
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
        self._inherited: list[str] = []
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
            piece, batch = batch.rows(slice(room)), batch.rows(slice(room, None))
            self._num_buffered = (self._num_buffered + len(piece)) % part_rows
            pieces.append((piece, self._num_buffered == 0))
        self._thread.submit(partial(self._add, pieces))

    def commit(self, *, seconds: float) -> Commit:
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
        )
        winner = self._publish(own)
        has_lost = winner.parts != own.parts  # equal where the client repeated a request that had succeeded
        if has_lost:
            logger.info("unit %s was committed by attempt %d meanwhile", winner.unit, winner.attempt)
        if has_lost:
            self._discard()
        for path in set(self._inherited) - {part.path for part in winner.parts}:
            self._store.delete(path)
        return winner

    def state_dict(self) -> dict[str, Any]:
        """The parts that are stored, and the rows that are too few for one.

        Raises:
            Exception: a batch could not be encoded or stored.
        """
        self._thread.drain()
        header, rows = self._digest.state
        return {
            "parts": _PARTS.dump_json(self._parts).decode(),
            "buffer": [torch.frombuffer(bytearray(_to_ipc(batch)), dtype=torch.uint8) for batch in self._buffer],
            "digest_header": header,
            "digest_rows": torch.frombuffer(bytearray(rows), dtype=torch.uint8) if rows else torch.empty(0),
            "objective": self._objective,
            "student_version": self._student_version,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from the state of another attempt.

        Its parts are copied: that attempt may still be alive somewhere, and deletes them when it loses the race.

        Raises:
            ValueError: a part is gone or damaged, or this is not such a state; begin again with another sink.
        """
        assert not self._parts, "nothing was written yet"
        try:
            inherited = _PARTS.validate_json(state["parts"])
            self._digest = RowsDigest.from_state(state["digest_header"], state["digest_rows"].numpy().tobytes())
            self._buffer = [_from_ipc(rows.numpy().tobytes()) for rows in state["buffer"]]
            self._objective, self._student_version = state["objective"], state["student_version"]
            for part in inherited:
                data = self._store.get(part.path)
                if xxhash.xxh3_128_hexdigest(data) != part.xxh3:
                    raise ValueError(f"{part.path} is damaged")
                self._store_part(data, rows=part.rows)
        except (KeyError, FileNotFoundError, pa.ArrowException) as error:
            raise ValueError(f"the state of unit {self._unit.id} cannot be resumed: {error}") from None
        self._num_buffered = _count(self._buffer)
        self._inherited = [part.path for part in inherited]

    def abandon(self) -> None:
        """Delete the parts that were written; if a commit that was tried may have succeeded, its parts stay."""
        self._thread.stop()
        if not self._is_sealed:
            self._discard()
            self._parts = []

    def release(self) -> None:
        """End the attempt, and leave its parts to the attempt that resumes from its state."""
        self._thread.stop()

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
        self._store_part(write_part(self._buffer), rows=_count(self._buffer))
        self._buffer = []

    def _store_part(self, data: bytes, *, rows: int) -> None:
        path = f"{self._prefix}-{len(self._parts):04d}.parquet"
        self._paths.append(path)  # first, so that a write that fails half-way is deleted too
        self._store.put(path, data)
        self._parts.append(Part(path=path, rows=rows, bytes=len(data), xxh3=xxhash.xxh3_128_hexdigest(data)))

    def _discard(self) -> None:
        for path in self._paths:
            self._store.delete(path)
        self._buffer, self._paths = [], []


def _to_ipc(rows: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_batch(rows)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _from_ipc(data: bytes) -> pa.RecordBatch:
    return pa.ipc.open_stream(data).read_next_batch()


def _count(rows: Sequence[pa.RecordBatch]) -> int:
    return sum(len(batch) for batch in rows)
