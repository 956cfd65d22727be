"""Speed of the transfer set beside raw pyarrow and beside other ways to feed a student, on the same images."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from raydfkd.bench.feeders import FEEDERS, ROW_GROUP, Feeder, raw_table
from raydfkd.bench.table import Row, alternate
from raydfkd.data.batches import SyntheticBatch
from raydfkd.data.commits import Commit
from raydfkd.data.set_source import GrowingSource
from raydfkd.data.sources import Feed
from raydfkd.data.transfer_set import TransferSet
from raydfkd.devices import cpu_threads, device_name, keep_freed_memory
from raydfkd.units import Request, WorkUnit, plan_name

CLASSES = 10
ROWS = {32: 40_000, 224: 800}
"""Images that are written, by their size in pixels; about 120 MB each."""
BATCH = {32: 256, 224: 64}
"""Images of a batch."""


def bench_shards(
    *, rounds: int = 7, feeders: Mapping[str, Feeder] = FEEDERS, rows: Mapping[int, int] = ROWS
) -> Iterator[Row]:
    """Rows per second for each image size: writing and reading parts against raw pyarrow, then feeding a student.

    Parts are read whole and checked. Feeding is a first epoch over all rows, shuffled, as uint8 batches on the host,
    pinned where there is CUDA; against raw pyarrow and every other of ``feeders`` that is installed. Tensors are
    worked on by one thread.
    """
    keep_freed_memory()
    with cpu_threads(1):
        for size, count in rows.items():
            with tempfile.TemporaryDirectory() as folder:
                batch = random_batch(count, size)
                transfer_set = TransferSet(f"{folder}/set", digest="bench")
                transfer_set.create()
                commit = write_unit(transfer_set, "fed", [batch])
                yield from _bench_parts(Path(folder), transfer_set, commit, batch, rounds)
                yield from _bench_feeding(Path(folder), transfer_set, batch, rounds, feeders)


def random_batch(count: int, size: int, *, seed: int = 0) -> SyntheticBatch:
    """Noise of three channels with labels and logits."""
    rng = torch.Generator().manual_seed(seed)
    return SyntheticBatch(
        images=torch.randint(0, 256, (count, 3, size, size), generator=rng, dtype=torch.uint8),
        labels=torch.randint(0, CLASSES, (count,), generator=rng),
        teacher_logits=torch.randn(count, CLASSES, generator=rng).half(),
        objective=0.0,
    )


def write_unit(transfer_set: TransferSet, unit: str, batches: list[SyntheticBatch]) -> Commit:
    """Commit the batches as a unit of that name."""
    request = Request(classes=(0,), images_per_class=sum(map(len, batches)), seed=0, class_seeds=(0,))
    sink = transfer_set.open(WorkUnit(id=unit, request=request))
    for batch in batches:
        sink.write(batch)
    return sink.commit(seconds=0.0)


def _bench_parts(
    folder: Path, transfer_set: TransferSet, commit: Commit, batch: SyntheticBatch, rounds: int
) -> Iterator[Row]:
    count, size = len(batch), batch.images.shape[-1]
    device = device_name(torch.device("cpu"))
    raw = folder / "raw.parquet"
    written = 0

    def write() -> int:
        nonlocal written
        written += 1
        return write_unit(transfer_set, f"u{written}", [batch]).images

    def write_raw() -> int:
        with raw.open("wb") as file:
            pq.write_table(raw_table(batch), file, row_group_size=ROW_GROUP, compression="none", use_dictionary=False)
            os.fsync(file.fileno())
        return count

    speed, ratio = alternate(write, write_raw, rounds=rounds)
    yield Row(case=f"write {size} px", device=device, rows_per_s=round(speed), ratio_raw=ratio)

    def read() -> int:
        return sum(int(transfer_set.read(part).images.clone().shape[0]) for part in commit.parts)

    def read_raw() -> int:
        rows = 0
        for record in pq.ParquetFile(raw).iter_batches(batch_size=ROW_GROUP, columns=["image", "label"]):
            pixels = np.frombuffer(record["image"].buffers()[1], np.uint8)
            rows += torch.from_numpy(pixels.reshape(-1, *batch.images.shape[1:]).copy()).shape[0]
        return rows

    speed, ratio = alternate(read, read_raw, rounds=rounds)
    yield Row(
        case=f"read {size} px",
        device=device,
        rows_per_s=round(speed),
        ratio_raw=ratio,
        note="checksum included; raw pyarrow makes none",
    )


def _bench_feeding(
    folder: Path, transfer_set: TransferSet, batch: SyntheticBatch, rounds: int, feeders: Mapping[str, Feeder]
) -> Iterator[Row]:
    count, size = len(batch), batch.images.shape[-1]
    batch_size, pin_memory = BATCH[size], torch.cuda.is_available()

    def feed() -> int:
        feed = Feed(
            transfer_set=transfer_set,
            units=["fed"],
            planned_images=count,
            plan=plan_name(["fed"]),
            image_bytes=3 * size**2,
            steps=count // batch_size,
            batch_size=batch_size,
            seed=0,
            pin_memory=pin_memory,
        )
        rows, batches = 0, iter(GrowingSource(feed))
        while rows < count:
            rows += len(next(batches).images)
        return rows

    for number, (name, feeder) in enumerate(feeders.items()):
        case, device = f"feed {size} px, {name}", device_name(torch.device("cpu"))
        own = folder / str(number)
        own.mkdir()
        try:
            other = feeder(own, batch, batch_size, pin_memory)
        except ImportError as error:
            yield Row(case=case, device=device, note=f"skipped: {error.name} is missing; pip install 'raydfkd[bench]'")
            continue
        speed, ratio = alternate(feed, other, rounds=rounds)
        yield Row(case=case, device=device, rows_per_s=round(speed), ratio_raw=ratio)
