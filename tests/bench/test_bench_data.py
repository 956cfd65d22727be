"""The benchmarks of the transfer set run and name their fields; how fast anything is, is not a test."""

from __future__ import annotations

import json

import pytest
import torch

from raydfkd.bench import overlap, shards, student
from raydfkd.bench.feeders import FEEDERS, WORKERS, raw_pyarrow
from raydfkd.bench.overlap import bench_overlap, natural_batch
from raydfkd.bench.shards import bench_shards, random_batch
from raydfkd.bench.student import StudentCase, bench_student


def rows_of(measured):
    return [json.loads(row.to_json()) for row in measured]


@pytest.fixture
def _small_batches(monkeypatch):
    monkeypatch.setitem(shards.BATCH, 8, 4)


@pytest.mark.usefixtures("_small_batches")
def test_shards_are_written_read_and_fed_beside_raw_pyarrow():
    measured = rows_of(bench_shards(rounds=1, feeders={"raw pyarrow": raw_pyarrow}, rows={8: 20}))
    assert [row["case"] for row in measured] == ["write 8 px", "read 8 px", "feed 8 px, raw pyarrow"]
    for row in measured:
        assert row["rows_per_s"] > 0
        assert row["ratio_raw"] > 0


@pytest.mark.usefixtures("_small_batches")
def test_feeder_that_is_not_installed_is_skipped_and_says_what_to_install():
    def missing(*_):
        raise ModuleNotFoundError("No module named 'streaming'", name="streaming")

    *_, row = rows_of(bench_shards(rounds=1, feeders={"MosaicML Streaming": missing}, rows={8: 20}))
    assert row.keys() == {"case", "device", "note"}
    assert row["note"] == "skipped: streaming is missing; pip install 'raydfkd[bench]'"


@pytest.mark.parametrize("name", FEEDERS)
def test_feeder_goes_over_every_row_in_every_pass(name, tmp_path):
    package = {"MosaicML": "streaming", "LitData": "litdata"}.get(name.split(maxsplit=1)[0].rstrip(","))
    if package:
        pytest.importorskip(package)
    one_pass = FEEDERS[name](tmp_path, random_batch(20, 8), 8, False)
    assert [one_pass(), one_pass()] == [20, 20]


def test_loaders_are_measured_without_workers_and_with_some():
    names = [name for name in FEEDERS if name != "raw pyarrow"]
    assert [name.partition(", ")[0] for name in names] == ["MosaicML Streaming"] * 2 + ["LitData"] * 2
    assert all(any(word in name for name in names) for word in ("no worker", f"{WORKERS} workers"))


def test_overlap_is_measured_for_every_encoding(monkeypatch):
    monkeypatch.setattr(overlap, "SIZES", {8: 2})
    measured = rows_of(bench_overlap(rounds=1, device="cpu", batch_s=0.001))
    assert [row["case"] for row in measured] == [f"overlap 8 px {kind}" for kind in ("raw", "png", "jpeg", "webp")]
    for row in measured:
        assert 0 <= row["idle_share"] < 1


def test_images_of_the_overlap_benchmark_are_neither_flat_nor_noise():
    images = natural_batch(4, 32, torch.device("cpu")).images.float()
    step = (images[..., 1:] - images[..., :-1]).abs().mean()
    assert 1 < step < images.std()


def test_student_is_trained_from_disk_and_from_memory(monkeypatch):
    case = StudentCase(network="convnet", size=8, rows=16, batch_size=4, options={"widths": (4,)})
    monkeypatch.setattr(student, "CPU_CASES", (case,))
    (row,) = rows_of(bench_student(rounds=1, device="cpu"))
    assert row["case"] == "student convnet 8 px batch 4"
    assert row["rows_per_s"] > 0
    assert row["ratio_raw"] > 0
