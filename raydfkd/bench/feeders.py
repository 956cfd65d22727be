"""Other ways to feed a student with shuffled batches; they are used for comparison only."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from raydfkd.data.batches import SyntheticBatch

ROW_GROUP = 2000
Pass = Callable[[], int]
"""Goes once over all rows as shuffled uint8 batches [N, C, H, W] on the host; returns how many rows it saw."""
Feeder = Callable[[Path, SyntheticBatch, int, bool], Pass]
"""Writes rows to a folder, and reads them back in batches of a size, pinned or not; ImportError where not installed."""


def raw_table(batch: SyntheticBatch) -> pa.Table:
    """The columns that a student reads, without any copy."""
    columns = {"image": batch.images, "teacher_logits": batch.teacher_logits}
    arrays: dict[str, Any] = {"label": batch.labels.numpy().astype(np.int32)}
    for name, tensor in columns.items():
        width = tensor[0].numel() * tensor.element_size()
        buffers = [None, pa.py_buffer(tensor.numpy().reshape(-1))]
        arrays[name] = pa.Array.from_buffers(pa.binary(width), len(batch), buffers)
    return pa.table(arrays)


def raw_pyarrow(folder: Path, batch: SyntheticBatch, batch_size: int, pin: bool) -> Pass:
    """Row groups in random order, and the rows of each of them in random order."""
    path = folder / "rows.parquet"
    pq.write_table(raw_table(batch), path, row_group_size=ROW_GROUP, compression="none", use_dictionary=False)
    shape = batch.images.shape[1:]

    def one_pass() -> int:
        rows, file = 0, pq.ParquetFile(path)
        for group in torch.randperm(file.num_row_groups).tolist():
            record = file.read_row_group(group, columns=["image", "label"], use_threads=False)
            pixels = np.frombuffer(record["image"].combine_chunks().buffers()[1], np.uint8).reshape(-1, *shape)
            for picked in torch.randperm(len(pixels)).split(batch_size):
                images = torch.from_numpy(np.take(pixels, picked.numpy(), axis=0))
                rows += len(images.pin_memory() if pin else images)
        return rows

    return one_pass


def mosaicml_streaming(folder: Path, batch: SyntheticBatch, batch_size: int, pin: bool, *, workers: int = 0) -> Pass:
    """MosaicML Streaming: MDS shards of arrays, its default shuffle; ``workers`` processes, or this one."""
    streaming: Any = import_module("streaming")
    shape = ",".join(map(str, batch.images.shape[1:]))
    with streaming.MDSWriter(out=str(folder), columns={"image": f"ndarray:uint8:{shape}", "label": "int"}) as writer:
        for image, label in zip(batch.images.numpy(), batch.labels.tolist(), strict=True):
            writer.write({"image": image, "label": label})
    dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=batch_size)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=batch_size, pin_memory=pin, num_workers=workers, persistent_workers=workers > 0
    )
    return lambda: _count(batch["image"] for batch in loader)


def litdata(folder: Path, batch: SyntheticBatch, batch_size: int, pin: bool, *, workers: int = 0) -> Pass:
    """LitData: chunks of 64 MB of arrays, its shuffle; ``workers`` processes, or this one."""
    library: Any = import_module("litdata")
    cache = import_module("litdata.streaming.cache").Cache(str(folder), chunk_bytes="64MB")
    for index, (image, label) in enumerate(zip(batch.images.numpy(), batch.labels.tolist(), strict=True)):
        cache[index] = {"image": image, "label": label}
    cache.done()
    cache.merge()
    dataset = library.StreamingDataset(str(folder), shuffle=True)
    loader = library.StreamingDataLoader(
        dataset, batch_size=batch_size, pin_memory=pin, num_workers=workers, persistent_workers=workers > 0
    )
    return lambda: _count(batch["image"] for batch in loader)


def ray_data(folder: Path, batch: SyntheticBatch, batch_size: int, pin: bool) -> Pass:
    """Ray Data, in a Ray of its own."""
    feeder: Feeder = import_module("raydfkd.bench.ray_data").ray_data
    return feeder(folder, batch, batch_size, pin)


WORKERS = os.cpu_count() or 1
"""Processes that the loaders with workers have, as many as there are cores; ours reads on threads of this process."""
FEEDERS: Mapping[str, Feeder] = {
    "raw pyarrow": raw_pyarrow,
    "MosaicML Streaming, no worker": mosaicml_streaming,
    f"MosaicML Streaming, {WORKERS} workers": partial(mosaicml_streaming, workers=WORKERS),
    "LitData, no worker": litdata,
    f"LitData, {WORKERS} workers": partial(litdata, workers=WORKERS),
}


def _count(batches: Iterable[Tensor]) -> int:
    return sum(len(images) for images in batches)
