"""The benchmarks run and name their fields; how fast anything is, is not a test."""

import json

import pytest
import torch
from torch import nn

from raydfkd.bench.published import published_loop
from raydfkd.bench.synthesis import bench_synthesis
from raydfkd.bench.table import Row, alternate, table


def test_rows_of_the_synthesis_benchmark_carry_the_names_that_scripts_rely_on():
    rows = [json.loads(row.to_json()) for row in bench_synthesis(rounds=1, steps=1, device="cpu")]
    assert len(rows) == 2
    for row in rows:
        assert row.keys() == {"case", "device", "steps_per_s", "ratio_published"}
        assert row["steps_per_s"] > 0


def test_published_loop_makes_progress_on_its_own_copy_of_the_images():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    images = torch.randn(6, 1, 8, 8)
    before = images.clone()
    step = published_loop(teacher.eval(), images, torch.arange(6) % 3, lr=0.1)
    losses = [step() for _ in range(30)]
    assert losses[-1] < losses[0]
    assert torch.equal(images, before)


def test_ratio_is_the_median_over_pairs(monkeypatch):
    clock = iter([0, 1, 1, 2, 2, 3, 3, 5, 5, 6, 6, 16])  # seconds of three pairs: 1 and 1, 1 and 2, 1 and 10
    monkeypatch.setattr("raydfkd.bench.table.time.perf_counter", lambda: next(clock))
    assert alternate(lambda: 10, lambda: 10, rounds=3) == pytest.approx((10, 5, 2))


def test_table_leaves_out_columns_that_no_row_has():
    text = table([Row(case="a", device="cpu", rows_per_s=1234.5), Row(case="b", device="cpu")])
    assert text.splitlines() == ["case  device  rows_per_s", "a     cpu     1,234.50", "b     cpu     -"]
