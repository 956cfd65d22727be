"""The commit protocol on a store that fails in every way at once."""

from __future__ import annotations

import itertools
import logging
import random
import threading
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from faulty import PLANS, Faults, FaultyFileSystem

from raydfkd.data.batches import SyntheticBatch
from raydfkd.data.garbage import collect_garbage
from raydfkd.data.transfer_set import TransferSet
from raydfkd.store import retry as failures
from raydfkd.store.errors import DamagedError
from raydfkd.units import plan_units

DIGEST = "d" * 64
RATES = {"refused": 0.04, "timeout": 0.02, "lost": 0.04, "partial": 0.02, "stale": 0.3}


def images_of(unit):
    rng = torch.Generator().manual_seed(unit.request.seed % 2**31)
    return SyntheticBatch(
        images=torch.randint(0, 256, (6, 1, 2, 2), dtype=torch.uint8, generator=rng),
        labels=torch.randint(0, 7, (6,), generator=rng),
        teacher_logits=torch.randn(6, 7, generator=rng).half(),
        objective=1.0,
        student_version=-1,
    )


class Storm:
    """Writers with competing attempts, readers, a collector and a disk that rots, on one set."""

    def __init__(self, units, faults):
        self.units = {unit.id: unit for unit in units}
        self.faults = faults
        plan = uuid.uuid4().hex
        PLANS[plan] = self.faults
        self._place = {"uri": f"faulty://{plan}/set", "storage_options": {"plan": plan}}
        self._root = f"/{plan}/set"
        self._attempts = itertools.count(1)
        self._is_over = threading.Event()
        self.seen = Counter()
        self.damaged = set()

    def open(self):
        return TransferSet(digest=DIGEST, part_rows=4, **self._place)

    def run(self, *, rot):
        """Commit every unit while a part or record of ``rot`` commits is damaged; returns the set when all is well."""
        driver = self.open()
        driver.create()
        with ThreadPoolExecutor(8) as pool:
            others = [
                pool.submit(self._until_it_is_over, act)
                for act in (self._read(seed=1), self._read(seed=2), self._collect())
            ]
            rotting = pool.submit(self._until_it_is_over, self._rot(rot))
            try:
                while missing := self.units.keys() - driver.snapshot().units:
                    list(pool.map(self._make, [unit for unit in sorted(missing) for _ in range(2)]))
                while self.faults.operations.total() < 10_000:
                    self._is_over.wait(0.01)
            finally:
                self._is_over.set()
            for other in (*others, rotting):
                other.result()
            while any([verdict.damage for verdict in self.open().verify()]) or driver.damaged():
                list(pool.map(self._make, sorted(self.units.keys() - driver.snapshot().units)))
        return self.open()

    def _until_it_is_over(self, steps):
        while not self._is_over.is_set() and next(steps, "ended") != "ended":
            self._is_over.wait(0.005)

    def _make(self, unit):
        sink = self.open().open(self.units[unit], attempt=next(self._attempts))
        sink.write(images_of(self.units[unit]))
        assert sink.commit(seconds=1.0).unit == unit

    def _read(self, seed):
        rng, reader = random.Random(seed), self.open()
        while True:
            snapshot = reader.snapshot()
            assert len(set(snapshot.units)) == len(snapshot.units)
            for commit in rng.sample(snapshot.commits, min(4, len(snapshot.commits))):
                self.seen[commit.unit, commit.content] += 1
                try:
                    assert sum(len(reader.read(part)) for part in commit.parts) == 6
                except DamagedError as damage:
                    reader.mark_damaged(commit, damage)
            yield

    def _collect(self):
        collector = self.open()
        while True:
            collect_garbage(collector, older_than_s=1.0, dry_run=False)
            yield

    def _rot(self, times):
        rng, store = random.Random(3), FaultyFileSystem.store
        while len(self.damaged) < times:
            with self.faults.lock:
                within = f"{self._root}/{rng.choice(['parts', 'parts', 'commits'])}/"
                found = [path for path in store if path.startswith(within) and path not in self.damaged]
                if len(found) > 20:
                    path = rng.choice(found)
                    store[path].truncate(store[path].size // 2)
                    self.damaged.add(path)
            yield


@pytest.fixture
def storm(monkeypatch, caplog):
    monkeypatch.setattr(failures, "_FIRST_WAIT_S", 0.0005)
    monkeypatch.setattr(failures, "_LONGEST_WAIT_S", 0.002)
    caplog.set_level(logging.ERROR)
    units = plan_units(seed=1, classes=range(220), images_per_class=6, classes_per_unit=1, images_per_class_per_unit=6)
    return Storm(units, Faults(seed=11, **RATES))


def test_every_unit_is_committed_once_and_unchanged_whatever_the_store_does(storm, tmp_path):
    made = storm.run(rot=25)
    storm.faults.is_on = False
    assert len(made.store.list("quarantine")) > 5
    calm = TransferSet(str(tmp_path), digest=DIGEST, part_rows=4)
    calm.create()
    for unit in storm.units.values():
        sink = calm.open(unit)
        sink.write(images_of(unit))
        sink.commit(seconds=1.0)
    assert made.snapshot().units == tuple(sorted(storm.units))
    assert storm.open().content_digest() == calm.content_digest()
    assert set(storm.seen) <= {(commit.unit, commit.content) for commit in calm.snapshot().commits}
    for folder, extra in (("commits", len(storm.units)), ("quarantine", 0)):
        assert len(made.store.list(folder)) == extra + len(made.store.list("quarantine"))
    collect_garbage(made, older_than_s=-1.0, dry_run=False)
    named = [part.path for commit in made.snapshot().commits for part in commit.parts]
    assert made.store.list("parts") == sorted(named)
    assert storm.faults.operations.total() >= 10_000
    assert min(storm.faults.counts[kind] for kind, rate in storm.faults.rates.items() if rate) > 0
