"""Speed of the transfer set beside raw pyarrow on the same columns."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raydfkd.batches import SyntheticBatch
from raydfkd.bench.table import Row, alternate
from raydfkd.data.transfer_set import TransferSet
from raydfkd.pipeline import device_name
from raydfkd.schedule import Request, WorkUnit

CLASSES = 10


def bench_shards(*, rounds: int = 7) -> Iterator[Row]:
    """Two rows an image size: write and read rows per second, and their ratios to raw pyarrow's."""
    for size, count in ((32, 40_000), (224, 800)):
        with tempfile.TemporaryDirectory() as folder:
            yield from _bench_size(Path(folder), size, count, rounds)


def _bench_size(folder: Path, size: int, count: int, rounds: int) -> Iterator[Row]:
    rng = torch.Generator().manual_seed(0)
    batch = SyntheticBatch(
        images=torch.randint(0, 256, (count, 3, size, size), generator=rng, dtype=torch.uint8),
        labels=torch.randint(0, CLASSES, (count,), generator=rng),
        teacher_logits=torch.randn(count, CLASSES, generator=rng).half(),
        objective=0.0,
    )
    transfer_set = TransferSet(str(folder / "set"), digest="bench")
    transfer_set.create()
    written = 0

    def write() -> int:
        nonlocal written
        request = Request(classes=(0,), images_per_class=count, seed=0, class_seeds=(0,))
        sink = transfer_set.open(WorkUnit(id=f"u{written}", request=request))
        written += 1
        sink.write(batch)
        sink.commit(seconds=0.0, curve=[])
        return count

    raw = folder / "raw.parquet"

    def write_raw() -> int:
        with raw.open("wb") as file:
            pq.write_table(_raw_table(batch), file, row_group_size=2000, compression="none", use_dictionary=False)
            os.fsync(file.fileno())
        return count

    device = device_name(torch.device("cpu"))
    speed, _, ratio = alternate(write, write_raw, rounds=rounds)
    yield Row(case=f"write {size} px", device=device, rows_per_s=round(speed), ratio_raw=round(ratio, 3))

    parts = transfer_set.snapshot(within={"u0"}).commits[0].parts

    def read() -> int:
        return sum(len(transfer_set.read(part).labels) for part in parts)

    def read_raw() -> int:
        rows = 0
        for record in pq.ParquetFile(raw).iter_batches(batch_size=2000, columns=["image", "label"]):
            pixels = np.frombuffer(record["image"].buffers()[1], np.uint8)
            rows += torch.from_numpy(pixels.reshape(-1, 3, size, size).copy()).shape[0]
        return rows

    speed, _, ratio = alternate(read, read_raw, rounds=rounds)
    yield Row(
        case=f"read {size} px",
        device=device,
        rows_per_s=round(speed),
        ratio_raw=round(ratio, 3),
        note="checksum included; raw pyarrow makes none",
    )


def _raw_table(batch: SyntheticBatch) -> pa.Table:
    count, width = len(batch), batch.images[0].numel()
    pixels = pa.Array.from_buffers(pa.binary(width), count, [None, pa.py_buffer(batch.images.numpy().reshape(-1))])
    logits = pa.Array.from_buffers(
        pa.binary(2 * CLASSES), count, [None, pa.py_buffer(batch.teacher_logits.numpy().reshape(-1))]
    )
    return pa.table({"image": pixels, "label": batch.labels.numpy().astype(np.int32), "teacher_logits": logits})
