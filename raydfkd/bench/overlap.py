"""Measures the time that the device waits for images to be encoded, written and committed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from typing import get_args

import torch
from torch.nn import functional as F

from raydfkd.bench.table import Row, Spread, alternate
from raydfkd.data.batches import SyntheticBatch
from raydfkd.data.encodings import Encoding, EncodingKind
from raydfkd.data.transfer_set import TransferSet
from raydfkd.devices import cpu_threads, device_name, pick_device
from raydfkd.units import Request, WorkUnit

KINDS: tuple[EncodingKind, ...] = get_args(EncodingKind)
SIZES = {32: 256, 224: 8}
"""Images of a batch by their size in pixels; more than one device synthesizes in ``batch_s``."""
BATCHES = 8
"""Batches of a unit."""


def bench_overlap(*, rounds: int = 3, device: str = "auto", batch_s: float = 0.4) -> Iterator[Row]:
    """For each image size and encoding, the share of its time that the device waits, and images per second.

    A unit of eight batches is made with and without a sink to write them to; a batch takes the device ``batch_s``. On
    CUDA it multiplies matrices meanwhile, on CPU it is a pretended device that only lets the time pass.
    """
    target = pick_device(device, where="--device")
    work = _busy(target, batch_s) if target.type == "cuda" else lambda: time.sleep(batch_s)
    with cpu_threads(1):
        for size, count in SIZES.items():
            batch = natural_batch(count, size, target)
            for kind in KINDS:
                idle, speed = _idle_share(batch, kind, work, rounds)
                yield Row(
                    case=f"overlap {size} px {kind}",
                    device=device_name(target),
                    rows_per_s=round(speed),
                    idle_share=idle,
                )


def natural_batch(count: int, size: int, device: torch.device) -> SyntheticBatch:
    """Images as smooth and as noisy as synthetic ones, which is what a codec's speed depends on."""
    rng = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(count, 3, 8, 8, generator=rng), size=size, mode="bilinear")
    noisy = smooth + 0.03 * torch.randn(count, 3, size, size, generator=rng)
    return SyntheticBatch(
        images=(noisy.clamp(0, 1) * 255).to(device, torch.uint8),
        labels=torch.zeros(count, dtype=torch.int64, device=device),
        teacher_logits=torch.zeros(count, 1000, dtype=torch.half, device=device),
        objective=0.0,
    )


def _idle_share(
    batch: SyntheticBatch, kind: EncodingKind, work: Callable[[], object], rounds: int
) -> tuple[Spread, float]:
    """The share, and images per second with the sink."""
    with tempfile.TemporaryDirectory() as folder:
        transfer_set = TransferSet(folder, digest="bench", encoding=Encoding(kind=kind))
        transfer_set.create()
        units = 0

        def with_sink() -> int:
            nonlocal units
            units += 1
            request = Request(classes=(0,), images_per_class=BATCHES * len(batch), seed=0, class_seeds=(0,))
            sink = transfer_set.open(WorkUnit(id=f"u{units}", request=request))
            for _ in range(BATCHES):
                work()
                sink.write(batch)
            return sink.commit(seconds=0.0).images

        def without() -> int:
            for _ in range(BATCHES):
                work()
            return BATCHES * len(batch)

        speed, ratio = alternate(with_sink, without, rounds=rounds)
    shares = [max(0.0, 1 - value) for value in (ratio.high, ratio.median, ratio.low)]
    return Spread(low=shares[0], median=shares[1], high=shares[2]), speed


def _busy(device: torch.device, seconds: float) -> Callable[[], None]:
    """Matrix products that keep ``device`` busy for ``seconds``."""
    matrix = torch.randn(4096, 4096, device=device) / 64

    def multiply(times: int) -> None:
        for _ in range(times):
            torch.mm(matrix, matrix)
        torch.cuda.synchronize(device)

    multiply(10)
    started = time.perf_counter()
    multiply(100)
    times = max(1, round(100 * seconds / (time.perf_counter() - started)))
    return lambda: multiply(times)
