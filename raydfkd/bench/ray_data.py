"""Ray Data as a way to feed a student, for ``raydfkd bench shards``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
import ray.data
import torch

from raydfkd.bench.feeders import ROW_GROUP, Pass, raw_table
from raydfkd.data.batches import SyntheticBatch


def ray_data(folder: Path, batch: SyntheticBatch, batch_size: int, pin: bool) -> Pass:
    """Ray Data over Parquet files of fixed-size binary, as fast as it is known to be, shuffled by its local buffer."""
    if not ray.is_initialized():
        ray.init(num_cpus=2, log_to_driver=False, configure_logging=False)
    table = raw_table(batch)
    for first in range(0, len(batch), ROW_GROUP):
        pq.write_table(table.slice(first, ROW_GROUP), folder / f"{first:08d}.parquet", compression="none")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    dataset = ray.data.read_parquet(str(folder), columns=["image", "label"])
    shape = batch.images.shape[1:]

    def one_pass() -> int:
        rows = 0
        stream: Any = dataset.iter_batches(
            batch_size=batch_size, batch_format="pyarrow", local_shuffle_buffer_size=ROW_GROUP
        )
        for record in stream:
            pixels = record["image"].combine_chunks()
            width = pixels.type.byte_width
            begin = pixels.offset * width
            values = np.frombuffer(pixels.buffers()[1], np.uint8)[begin : begin + len(pixels) * width]
            images = torch.from_numpy(values.reshape(-1, *shape).copy())
            rows += len(images.pin_memory() if pin else images)
        return rows

    return one_pass
