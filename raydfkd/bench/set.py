"""Time, requests and bytes that a transfer set of many units costs those who poll it, read it and train on it."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from typing import Any, TypeVar
from uuid import uuid4

import fsspec
import torch
from fsspec.utils import get_protocol

from raydfkd.bench.shards import random_batch
from raydfkd.bench.table import Row
from raydfkd.checkpoints import checkpoint_bytes
from raydfkd.data.commits import Commit, Snapshot
from raydfkd.data.news import Watch
from raydfkd.data.set_source import SnapshotSource
from raydfkd.data.sources import Feed
from raydfkd.data.transfer_set import TransferSet
from raydfkd.devices import device_name
from raydfkd.seeds import derive_seed
from raydfkd.units import WorkUnit, plan_name, plan_units

T = TypeVar("T")
WRITERS = 16
"""Units that are written at once."""
SIZE, IMAGES = 8, 10
"""Pixels of an image and images of a unit."""


def bench_set(*, units: int, uri: str | None = None) -> Iterator[Row]:
    """Costs of a set of so many units on a local disk, and in a new folder at ``uri`` too if one is given.

    Units are committed one by one as synthesis commits them, but with noise for images, and their commits are
    remembered as the driver of a run on Ray remembers them. The requests are those to an S3 server, without repetitions
    of those that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        yield from _bench_place(f"{folder}/set", units, "local")
    if uri is not None:
        place = f"{uri.rstrip('/')}/bench-{uuid4().hex[:8]}"
        try:
            yield from _bench_place(place, units, get_protocol(uri))
        finally:
            file_system, path = fsspec.url_to_fs(place)
            file_system.rm(path, recursive=True)


def _bench_place(uri: str, count: int, place: str) -> Iterator[Row]:
    device = device_name(torch.device("cpu"))

    def row(case: str, cost: _Cost, size: int | None = None) -> Row:
        return Row(
            case=f"{place} {case}",
            device=device,
            seconds=round(cost.seconds, 3),
            requests=cost.requests if place != "local" else None,
            bytes=size,
        )

    plan = plan_units(
        seed=0, classes=range(count + 1), images_per_class=IMAGES, classes_per_unit=1, images_per_class_per_unit=IMAGES
    )
    planned, later = plan[:count], plan[count]
    _, cost = _costs(lambda: _make(uri, planned))
    yield row(f"{count:,} units: make the set", cost)
    reader = _set_at(uri)
    snapshot, cost = _costs(reader.snapshot)
    yield row("first snapshot of a process", cost)
    assert len(snapshot.commits) == count, "every unit is there"
    _, cost = _costs(reader.snapshot)
    yield row("the same snapshot again", cost)
    watch = Watch(reader.store, reader.progress)
    watch.news()
    _, cost = _costs(watch.news)
    yield row("look for news, none there", cost)
    _write(_set_at(uri), later)
    news, cost = _costs(watch.news)
    assert news is not None, "a unit has come"
    yield row("look for news, a unit has come", cost)
    yield from _bench_training(reader, planned, snapshot, row)
    for path in reader.store.list("packs"):
        reader.store.delete(path)
    _, cost = _costs(_set_at(uri).snapshot)
    yield row("first snapshot of a process, no packs there", cost)


def _bench_training(
    transfer_set: TransferSet, units: tuple[WorkUnit, ...], snapshot: Snapshot, row: Callable[..., Row]
) -> Iterator[Row]:
    feed = Feed(
        transfer_set=transfer_set,
        units=frozenset(unit.id for unit in units),
        planned_images=snapshot.images,
        plan=plan_name(unit.id for unit in units),
        image_bytes=3 * SIZE**2,
        steps=1,
        batch_size=256,
        seed=0,
    )
    source = SnapshotSource(feed)
    _, cost = _costs(lambda: source.plan(snapshot))
    yield row("plan an epoch", cost)
    packed, cost = _costs(lambda: Snapshot(snapshot.commits).packed)
    yield row("pack an epoch's snapshot for other ranks", cost, len(packed))
    _, cost = _costs(lambda: Snapshot.unpacked(packed))
    yield row("unpack it on one of them", cost)
    source = SnapshotSource(feed, window_rows=1)
    list(itertools.islice(source, 1))
    saved, cost = _costs(lambda: checkpoint_bytes({"source": source.state_dict()}))
    yield row("checkpoint of a student without weights", cost, len(saved))
    resumed = SnapshotSource(feed, window_rows=1)

    def resume() -> None:
        resumed.load_state_dict(source.state_dict())
        next(iter(resumed))

    _, cost = _costs(resume)
    yield row("resume from it, to the first batch", cost)


def _set_at(uri: str) -> TransferSet:
    """The set as a process of its own would have it."""
    return TransferSet(uri, digest="bench")


def _make(uri: str, units: tuple[WorkUnit, ...]) -> None:
    """Commit the units, and take note of their commits as the driver of a run does."""
    transfer_set = _set_at(uri)
    transfer_set.create()
    with ThreadPoolExecutor(WRITERS) as pool:
        for commit in pool.map(lambda unit: _write(transfer_set, unit), units):
            transfer_set.remember(commit)
            transfer_set.pack()


def _write(transfer_set: TransferSet, unit: WorkUnit) -> Commit:
    begun = time.perf_counter()
    seed = derive_seed(unit.id)
    sink = transfer_set.open(unit)
    sink.write(replace(random_batch(IMAGES, SIZE, seed=seed), objective=seed / 2**64))  # all unlike, as of a real run
    return sink.commit(seconds=time.perf_counter() - begun)


class _Cost:
    """The costs of a call."""

    seconds = 0.0
    requests = 0


def _costs(call: Callable[[], T]) -> tuple[T, _Cost]:
    cost = _Cost()
    with _counted(cost):
        begun = time.perf_counter()
        found = call()
        cost.seconds = time.perf_counter() - begun
    return found, cost


@contextlib.contextmanager
def _counted(cost: _Cost) -> Iterator[None]:
    """Count the requests of every S3 client of this process."""
    try:
        client: Any = import_module("aiobotocore.client").AioBaseClient
    except ImportError:
        yield
        return
    make = client._make_api_call

    def counted(*args: Any) -> Any:
        cost.requests += 1
        return make(*args)

    client._make_api_call = counted
    try:
        yield
    finally:
        client._make_api_call = make
