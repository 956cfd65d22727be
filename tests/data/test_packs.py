"""Packs are copies: they spare requests, and nothing depends on them."""

from __future__ import annotations

import pickle

import pytest

from raydfkd.data import commit_log
from raydfkd.data.transfer_set import TransferSet
from raydfkd.store.errors import DamagedError, StoreError
from raydfkd.store.store import Store
from raydfkd.units import plan_units

UNITS = plan_units(seed=1, classes=range(9), images_per_class=1, classes_per_unit=1, images_per_class_per_unit=1)
DIGEST = "d" * 64


@pytest.fixture(autouse=True)
def _small_packs(monkeypatch):
    monkeypatch.setattr(commit_log, "PACK", 4)


@pytest.fixture
def writer(uri):
    made = TransferSet(uri, digest=DIGEST)
    made.create()
    return made


@pytest.fixture
def reads(monkeypatch):
    """Folders of the objects that any store has read since."""
    made, do = [], Store._do

    def noted(self, act, path, *how):
        if act == "read":
            made.append(path.partition("/")[0])
        return do(self, act, path, *how)

    monkeypatch.setattr(Store, "_do", noted)
    return made


def commit(transfer_set, unit, make_batch):
    sink = transfer_set.open(unit)
    sink.write(make_batch(1))
    return sink.commit(seconds=1.0)


def another(transfer_set):
    """The same set as another process has it."""
    return pickle.loads(pickle.dumps(transfer_set))


def test_who_reads_many_records_packs_them_for_who_comes_later(writer, make_batch, reads):
    made = tuple(commit(writer, unit, make_batch) for unit in UNITS)
    reads.clear()
    assert another(writer).snapshot().commits == made
    assert reads == ["commits"] * 9
    reads.clear()
    assert another(writer).snapshot().commits == made
    assert reads == ["packs"]


def test_few_records_are_read_one_by_one_and_not_packed(writer, make_batch, reads):
    made = tuple(commit(writer, unit, make_batch) for unit in UNITS[:3])
    reads.clear()
    assert another(writer).snapshot().commits == made
    assert reads == ["commits"] * 3
    assert writer.store.list("packs") == []


def test_records_that_came_after_the_packs_are_read_one_by_one(writer, make_batch, reads):
    made = [commit(writer, unit, make_batch) for unit in UNITS[:5]]
    another(writer).snapshot()
    made += [commit(writer, unit, make_batch) for unit in UNITS[5:7]]
    reads.clear()
    assert another(writer).snapshot().commits == tuple(made)
    assert reads == ["packs", "commits", "commits"]


def test_driver_that_remembers_its_workers_commits_reads_no_record_and_packs_them(writer, make_batch, reads):
    driver = another(writer)
    made = []
    for unit in UNITS:
        made.append(commit(writer, unit, make_batch))
        driver.remember(made[-1])
        driver.pack()
    assert len(driver.store.list("packs")) == 2
    reads.clear()
    assert driver.snapshot().commits == tuple(made)
    assert reads == []
    assert another(writer).snapshot().commits == tuple(made)
    assert reads == ["packs", "packs", "commits"]


def test_commit_that_was_taken_out_after_it_was_packed_stays_out_and_its_successor_is_read(writer, make_batch):
    made = [commit(writer, unit, make_batch) for unit in UNITS]
    another(writer).snapshot()
    part = made[0].parts[0]
    writer.mark_damaged(made[0], DamagedError(writer.store.uri, part.path, "is damaged"))
    assert another(writer).snapshot().commits == tuple(made[1:])
    second = commit(writer, UNITS[0], make_batch)
    assert second.generation == 1
    assert another(writer).snapshot().commits == (second, *made[1:])


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: data.replace(b"1", b"2")])
def test_pack_that_is_damaged_is_as_good_as_none(damage, writer, make_batch):
    made = tuple(commit(writer, unit, make_batch) for unit in UNITS)
    another(writer).snapshot()
    (pack,) = writer.store.list("packs")
    writer.store.put(pack, damage(writer.store.get(pack)))
    assert another(writer).snapshot().commits == made
    assert writer.damaged() == set()


def test_reader_that_cannot_write_a_pack_reads_all_the_same(writer, make_batch, monkeypatch):
    made = tuple(commit(writer, unit, make_batch) for unit in UNITS)

    def refuse(path, data, **how):
        raise StoreError("s3://bucket/set/packs cannot be written (access denied)")

    reader = another(writer)
    monkeypatch.setattr(reader.store, "put", refuse)
    assert reader.snapshot().commits == made
