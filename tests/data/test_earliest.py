from __future__ import annotations

import pickle
import uuid
from datetime import UTC, datetime

import pytest
from faulty import PLANS, Faults, FaultyFileSystem

from raydfkd.data.collect import collect_garbage
from raydfkd.data.earliest import EarliestFolder
from raydfkd.data.failures import DamagedError
from raydfkd.data.store import Store
from raydfkd.data.transfer_set import TransferSet
from raydfkd.schedule import plan_units

(UNIT,) = plan_units(seed=0, classes=[0], images_per_class=6, classes_per_unit=1, images_per_class_per_unit=6)


@pytest.fixture(params=["always", "never"])
def place(request):
    """An object store that overwrites what it was told to create, or refuses to create."""
    plan = uuid.uuid4().hex
    PLANS[plan] = Faults(creates=request.param)
    return {"uri": f"faulty://{plan}/set", "storage_options": {"plan": plan}, "records": "earliest"}


@pytest.fixture
def at_once(monkeypatch):
    """Lets both of two writers believe that they are the first."""

    def write(one, other):
        looked = []
        monkeypatch.setattr(EarliestFolder, "exists", lambda folder, path: bool(looked.append(path)))
        made = one(), other()
        monkeypatch.undo()
        assert len(looked) >= 2
        return made

    return write


def claims(store, path):
    root = store.uri.removeprefix("faulty:/")
    return {name: file for name, file in FaultyFileSystem.store.items() if name.startswith(f"{root}/{path}~/")}


def test_probe_accepts_it_and_leaves_nothing(place):
    store = Store(**place)
    store.probe()
    assert store.list("") == []
    assert store.entries("") == ()


def test_first_record_stays(place):
    store = Store(**place)
    assert not store.exists("commits/a")
    assert store.put_new("commits/a", b"first")
    assert not store.put_new("commits/a", b"second")
    other = pickle.loads(pickle.dumps(store))
    assert other.get("commits/a") == b"first"
    assert other.exists("commits/a")
    assert other.list("commits") == ["commits/a"]
    with pytest.raises(FileNotFoundError):
        other.get("commits/b")


def test_other_objects_are_as_everywhere(place):
    store = Store(**place)
    store.put("parts/a", b"one")
    store.put("parts/a", b"two")
    assert store.get("parts/a") == bytes(store.view("parts/a")) == b"two"
    assert store.list("parts") == ["parts/a"]
    assert [entry.path for entry in store.entries("parts")] == ["parts/a"]


def test_deleted_record_can_be_created_again(place):
    store = Store(**place)
    store.put_new("students/1", b"first")
    store.delete("students/1")
    assert not store.exists("students/1")
    assert store.put_new("students/1", b"second")


def test_of_writers_at_once_the_earliest_wins(place, at_once):
    store = Store(**place)
    assert at_once(lambda: store.put_new("a", b"one"), lambda: store.put_new("a", b"other")) == (True, False)
    assert len(claims(store, "a")) == 2
    assert store.get("a") == b"one"


def test_of_records_with_the_same_time_all_readers_take_the_same(place, at_once):
    store = Store(**place)
    at_once(lambda: store.put_new("a", b"one"), lambda: store.put_new("a", b"other"))
    written = claims(store, "a")
    for file in written.values():
        file.created = datetime(2026, 1, 1, tzinfo=UTC)
    assert Store(**place).get("a") == written[min(written)].getvalue()


def test_of_attempts_that_commit_at_once_one_counts_and_the_other_is_garbage(place, at_once, make_batch):
    transfer_set, batch = TransferSet(digest="d" * 64, part_rows=4, **place), make_batch(6)
    transfer_set.create()
    sinks = [transfer_set.open(UNIT, attempt=attempt) for attempt in (1, 2)]
    for sink in sinks:
        sink.write(batch)
    made = at_once(*(lambda sink=sink: sink.commit(seconds=1.0, curve=[]) for sink in sinks))
    assert [commit.attempt for commit in made] == [1, 1]
    reader = TransferSet(digest="d" * 64, **place)
    assert reader.snapshot().commits == made[:1]
    assert reader.committed() == {UNIT.id}
    collect_garbage(reader, older_than_s=-1.0, dry_run=False)
    assert reader.store.list("parts") == sorted(part.path for part in made[0].parts)
    assert [verdict.damage for verdict in reader.verify()] == [None]


def test_reader_of_a_commit_that_another_came_before_finds_the_other(place, at_once, make_batch):
    transfer_set, batch = TransferSet(digest="d" * 64, **place), make_batch(6)
    transfer_set.create()
    sinks = [transfer_set.open(UNIT, attempt=attempt) for attempt in (1, 2)]
    for sink in sinks:
        sink.write(batch)
    reader = TransferSet(digest="d" * 64, **place)
    before = at_once(
        lambda: (sinks[0].commit(seconds=1.0, curve=[]), reader.snapshot())[1],
        lambda: sinks[1].commit(seconds=1.0, curve=[]),
    )[0]
    ours, other = claims(transfer_set.store, f"commits/{UNIT.id}.json").values()
    other.created = ours.created.replace(year=2025)  # a tick of the clock in which the other's name is the smaller
    collect_garbage(TransferSet(digest="d" * 64, **place), older_than_s=-1.0, dry_run=False)
    (commit,) = before.commits
    with pytest.raises(DamagedError, match="does not exist, but was committed") as caught:
        reader.read(commit.parts[0])
    assert not reader.quarantine(commit, caught.value)
    (after,) = reader.snapshot().commits
    assert (commit.attempt, after.attempt) == (1, 2)
    assert len(reader.read(after.parts[0])) == 6
