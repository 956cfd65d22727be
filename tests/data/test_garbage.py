from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from raydfkd.data import garbage as collect
from raydfkd.data.garbage import collect_garbage
from raydfkd.data.transfer_set import TransferSet
from raydfkd.errors import RecipeError
from raydfkd.store.errors import DamagedError, StoreError
from raydfkd.units import plan_units

UNITS = plan_units(seed=1, classes=range(3), images_per_class=4, classes_per_unit=1, images_per_class_per_unit=4)
DIGEST = "d" * 64
HOUR = 3600.0


class AgedSet(TransferSet):
    """A set whose objects can be made older than they are."""

    def age(self, seconds, *paths):
        for path in paths:
            place = f"{self.store.uri}/{path}"
            if place.startswith("memory:"):
                file = MemoryFileSystem.store[place.removeprefix("memory:/")]
                file.created = type(file.created).fromtimestamp(time.time() - seconds, file.created.tzinfo)
            else:
                os.utime(place, times=(0, Path(place).stat().st_mtime - seconds))


@pytest.fixture
def aged_set(uri):
    made = AgedSet(uri, digest=DIGEST, part_rows=4)
    made.create()
    return made


@pytest.fixture
def attempt(aged_set, make_batch):
    """Begins attempts of two parts at a unit; returns the sink and the paths of the parts."""

    def begin(unit):
        before = set(aged_set.store.list("parts"))
        sink = aged_set.open(unit)
        sink.write(make_batch(8))
        sink._thread.drain()
        return sink, sorted(set(aged_set.store.list("parts")) - before)

    return begin


def test_parts_of_attempts_that_died_go_and_committed_ones_stay(aged_set, attempt):
    (sink, committed), (_, dead) = attempt(UNITS[0]), attempt(UNITS[1])
    made = sink.commit(seconds=1.0)
    size = sum(entry.bytes for entry in aged_set.store.entries("parts") if entry.path in dead)
    aged_set.age(2 * HOUR, *committed, *dead, f"commits/{made.unit}.json")
    garbage = collect_garbage(aged_set, older_than_s=HOUR, dry_run=False)
    assert (garbage.paths, garbage.bytes) == (tuple(dead), size)
    assert aged_set.store.list("parts") == committed
    assert aged_set.snapshot().commits == (made,)


def test_dry_run_reports_the_same_and_removes_nothing(aged_set, attempt):
    _, dead = attempt(UNITS[0])
    aged_set.age(2 * HOUR, *dead)
    before = [aged_set.store.list(folder) for folder in ("", "parts")]
    report = collect_garbage(aged_set, older_than_s=HOUR, dry_run=True)
    assert [aged_set.store.list(folder) for folder in ("", "parts")] == before
    assert report == collect_garbage(aged_set, older_than_s=HOUR, dry_run=False)
    assert collect_garbage(aged_set, older_than_s=HOUR, dry_run=False).paths == ()


def test_attempt_is_as_old_as_its_newest_part(aged_set, attempt):
    sink, (first, second) = attempt(UNITS[0])
    aged_set.age(9 * HOUR, first)
    assert collect_garbage(aged_set, older_than_s=HOUR, dry_run=False).paths == ()
    made = sink.commit(seconds=1.0)
    assert [part.path for part in made.parts] == [first, second]
    assert sum(len(aged_set.read(part)) for part in made.parts) == 8


@pytest.mark.parametrize("skew_s", [-86400.0, 86400.0])
def test_wrong_clock_here_neither_deletes_nor_keeps(skew_s, aged_set, attempt, monkeypatch):
    (_, fresh), (_, dead) = attempt(UNITS[0]), attempt(UNITS[1])
    aged_set.age(2 * HOUR, *dead)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + skew_s)
    assert collect_garbage(aged_set, older_than_s=HOUR, dry_run=False).paths == tuple(dead)
    assert aged_set.store.list("parts") == fresh


@pytest.mark.parametrize("skew_s", [-86400.0, 86400.0])
def test_wrong_clock_of_the_store_neither_deletes_nor_keeps(skew_s, aged_set, attempt, monkeypatch):
    (_, fresh), (_, dead) = attempt(UNITS[0]), attempt(UNITS[1])
    aged_set.age(2 * HOUR - skew_s, *dead)
    aged_set.age(-skew_s, *fresh)
    now = aged_set.store.now
    monkeypatch.setattr(aged_set.store, "now", lambda: now() + skew_s)
    assert collect_garbage(aged_set, older_than_s=HOUR, dry_run=False).paths == tuple(dead)
    assert aged_set.store.list("parts") == fresh


@pytest.mark.parametrize("moment", ["list parts", "list commits", "look at the unit"])
def test_commit_that_appears_meanwhile_keeps_its_parts(moment, aged_set, attempt, monkeypatch):
    sink, parts = attempt(UNITS[0])
    aged_set.age(2 * HOUR, *parts)
    store, made = aged_set.store, []

    def commits_after(call, when):
        def wrapped(prefix):
            found = call(prefix)
            if prefix == when and not made:
                made.append(sink.commit(seconds=1.0))
            return found

        return wrapped

    if moment == "list parts":
        monkeypatch.setattr(store, "entries", commits_after(store.entries, "parts"))
    elif moment == "list commits":
        monkeypatch.setattr(store, "list", commits_after(store.list, "quarantine"))
    else:
        still_garbage = collect._still_garbage
        monkeypatch.setattr(
            collect,
            "_still_garbage",
            lambda *args: made.append(sink.commit(seconds=1.0)) or still_garbage(*args),
        )
    assert collect_garbage(aged_set, older_than_s=HOUR, dry_run=False).paths == ()
    assert [part.path for part in made[0].parts] == store.list("parts") == parts


def test_parts_of_a_quarantined_commit_go_and_its_records_stay(aged_set, attempt):
    sink, parts = attempt(UNITS[0])
    made = sink.commit(seconds=1.0)
    aged_set.age(2 * HOUR, *parts)
    aged_set.mark_damaged(made, DamagedError(aged_set.store.uri, parts[0], "is damaged"))
    assert collect_garbage(aged_set, older_than_s=HOUR, dry_run=False).paths == tuple(parts)
    assert aged_set.damaged() == {made.unit}
    assert aged_set.store.list("commits") == [f"commits/{made.unit}.json"]


def test_states_of_committed_units_go_and_those_of_others_stay(aged_set, attempt):
    sink, _ = attempt(UNITS[0])
    sink.commit(seconds=1.0)
    states = [f"resume/{unit.id}.pt" for unit in UNITS]
    for path in (*states, "resume/note.txt"):
        aged_set.store.put(path, b"state")
    assert collect_garbage(aged_set, older_than_s=HOUR, dry_run=False).paths == ()
    aged_set.age(2 * HOUR, *states, "resume/note.txt")
    assert collect_garbage(aged_set, older_than_s=HOUR, dry_run=False).paths == (states[0],)


def test_parts_of_a_unit_that_can_be_gone_on_with_stay_until_it_is_committed(aged_set, attempt):
    _, left = attempt(UNITS[0])
    state = f"resume/{UNITS[0].id}.pt"
    aged_set.store.put(state, b"names them")
    aged_set.age(2 * HOUR, *left, state)
    assert collect_garbage(aged_set, older_than_s=HOUR, dry_run=False).paths == ()
    sink, _ = attempt(UNITS[0])
    sink.commit(seconds=1.0)
    assert collect_garbage(aged_set, older_than_s=HOUR, dry_run=False).paths == (*left, state)


def test_temporary_files_of_killed_processes_go_and_other_hidden_files_stay(aged_set):
    code = uuid.uuid4().hex
    leftovers = [f".probe-{code}", f"commits/.u.json.{code}", f"parts/.u-1-0.parquet.{code}", f"resume/.u.pt.{code}"]
    strangers = [".gitignore", "parts/.nfs0001", "parts/notes.txt", "parts/other.parquet", "notes.txt"]
    young = f"parts/.young.{code}"
    for path in (*leftovers, *strangers, young):
        aged_set.store.put(path, b"x")
    aged_set.age(2 * HOUR, *leftovers, *strangers)
    garbage = collect_garbage(aged_set, older_than_s=HOUR, dry_run=False)
    assert garbage.paths == tuple(sorted(leftovers))
    assert all(aged_set.store.exists(path) for path in (*strangers, young))


def test_set_of_another_recipe_or_format_is_left_alone(aged_set, attempt, uri):
    _, dead = attempt(UNITS[0])
    aged_set.age(2 * HOUR, *dead)
    with pytest.raises(RecipeError, match="holds a set of another recipe"):
        collect_garbage(TransferSet(uri, digest="e" * 64), older_than_s=HOUR, dry_run=False)
    assert aged_set.store.list("parts") == dead


def test_store_that_keeps_no_times_is_refused(aged_set, monkeypatch):
    monkeypatch.setattr(type(aged_set.store._folder), "modified", lambda *_: None)
    with pytest.raises(StoreError, match="does not say when an object was written"):
        collect_garbage(aged_set, older_than_s=HOUR, dry_run=False)
    assert aged_set.store.entries("")[0].path == "set.json"
