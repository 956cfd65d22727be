"""The benchmark of a large set runs and names its fields; how fast anything is, is not a test."""

from __future__ import annotations

import json
import uuid

import fsspec
import pytest

from raydfkd.bench.set import bench_set
from raydfkd.data import commit_log


@pytest.fixture(autouse=True)
def _small_packs(monkeypatch):
    monkeypatch.setattr(commit_log, "PACK", 4)


CASES = [
    "first snapshot of a process",
    "the same snapshot again",
    "look for news, none there",
    "look for news, a unit has come",
    "plan an epoch",
    "pack an epoch's snapshot for other ranks",
    "unpack it on one of them",
    "checkpoint of a student without weights",
    "resume from it, to the first batch",
    "first snapshot of a process, no packs there",
]


def test_costs_of_a_set_are_measured_on_disk_and_where_they_are_asked_for_and_nothing_is_left_there():
    place = f"memory://{uuid.uuid4().hex}"
    rows = [json.loads(row.to_json()) for row in bench_set(units=10, uri=place)]
    names = ["10 units: make the set", *CASES]
    assert [row["case"] for row in rows] == [f"{where} {name}" for where in ("local", "memory") for name in names]
    assert all(row["seconds"] >= 0 for row in rows)
    assert {row["case"].partition(" ")[2] for row in rows if "bytes" in row} == {CASES[5], CASES[7]}
    assert fsspec.url_to_fs(place)[0].find(place) == []
