"""A poll costs one small request while nothing changes, and misses nothing."""

from __future__ import annotations

import uuid

import pytest
from faulty import PLANS, Faults

from raydfkd.data import news
from raydfkd.data.news import Watch
from raydfkd.data.transfer_set import TransferSet
from raydfkd.store.errors import DamagedError, OutageError
from raydfkd.store.store import Store
from raydfkd.units import plan_units

UNITS = plan_units(seed=1, classes=range(3), images_per_class=4, classes_per_unit=1, images_per_class_per_unit=4)
DIGEST = "d" * 64


@pytest.fixture
def writer(uri):
    made = TransferSet(uri, digest=DIGEST)
    made.create()
    return made


@pytest.fixture
def watch(writer, uri):
    reader = TransferSet(uri, digest=DIGEST)
    return Watch(reader.store, reader.progress)


@pytest.fixture
def requests(monkeypatch):
    """Names of the operations that any store is asked for."""
    made, do = [], Store._do
    monkeypatch.setattr(
        Store, "_do", lambda self, act, path, *how: made.append((act, path)) or do(self, act, path, *how)
    )
    return made


def commit(transfer_set, unit, make_batch):
    sink = transfer_set.open(unit)
    sink.write(make_batch(4))
    return sink.commit(seconds=1.0)


def test_first_look_always_lists(watch):
    assert watch.news().committed == set()


def test_where_nothing_is_new_one_small_object_is_read(writer, watch, make_batch, requests):
    commit(writer, UNITS[0], make_batch)
    watch.news()
    requests.clear()
    assert watch.news() is None
    assert requests == [("read", "changed")]


def test_every_commit_and_every_damage_is_news(writer, watch, make_batch):
    watch.news()
    made = commit(writer, UNITS[0], make_batch)
    assert watch.news().committed == {made.unit}
    writer.mark_damaged(made, DamagedError(writer.store.uri, made.parts[0].path, "is damaged"))
    seen = watch.news()
    assert (seen.committed, seen.damaged) == (set(), {made.unit})
    commit(writer, UNITS[0], make_batch)
    seen = watch.news()
    assert (seen.committed, seen.damaged) == ({made.unit}, set())
    assert watch.news() is None


def test_what_is_committed_while_the_set_is_listed_is_news_at_the_next_look(writer, uri, make_batch):
    reader = TransferSet(uri, digest=DIGEST)

    def look():
        seen = reader.progress()
        if not seen.committed:
            commit(writer, UNITS[0], make_batch)
        return seen

    watch = Watch(reader.store, look)
    assert watch.news().committed == set()
    assert watch.news().committed == {UNITS[0].id}


def test_commit_whose_writer_died_before_it_told_is_found_after_a_while(writer, watch, make_batch, monkeypatch):
    watch.news()
    monkeypatch.setattr("raydfkd.data.commit_log.tell_of_change", lambda store: None)
    made = commit(writer, UNITS[0], make_batch)
    assert watch.news() is None
    assert watch.news(at_once=True).committed == {made.unit}
    monkeypatch.setattr(news, "LOOK_ANYWAY_S", 0.0)
    monkeypatch.setattr(news, "LOOK_ANYWAY_TIMES", 0)
    watch.news(at_once=True)
    assert watch.news().committed == {made.unit}


def test_look_that_took_long_is_followed_by_a_long_rest(writer, make_batch, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(news.time, "monotonic", lambda: clock[0])

    def look():
        clock[0] += 6.0
        return writer.progress()

    watch = Watch(writer.store, look, rest=20)
    watch.news()
    made = commit(writer, UNITS[0], make_batch)
    clock[0] = 125.0
    assert watch.news() is None
    assert watch.news(at_once=True).committed == {made.unit}
    commit(writer, UNITS[1], make_batch)
    clock[0] += 121.0
    assert len(watch.news().committed) == 2


def test_attempt_that_finds_its_unit_committed_tells_for_a_writer_that_died(writer, watch, make_batch, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("raydfkd.data.commit_log.tell_of_change", lambda store: None)
        commit(writer, UNITS[0], make_batch)
    watch.news()
    commit(writer, UNITS[0], make_batch)
    assert watch.news() is not None


def test_commit_stands_where_nobody_can_be_told_of_it(writer, make_batch, monkeypatch):
    put = writer.store.put

    def refuse(path, data, **how):
        if path == "changed":
            raise OutageError("s3://bucket/set/changed cannot be written (tried again and again)")
        put(path, data)

    monkeypatch.setattr(writer.store, "put", refuse)
    made = commit(writer, UNITS[0], make_batch)
    assert writer.snapshot().commits == (made,)


def test_look_that_failed_is_made_again(writer, make_batch):
    outages = [OutageError("away")]

    def look():
        if outages:
            raise outages.pop()
        return writer.progress()

    watch = Watch(writer.store, look)
    made = commit(writer, UNITS[0], make_batch)
    with pytest.raises(OutageError):
        watch.news()
    assert watch.news().committed == {made.unit}


def test_set_that_is_found_closed_is_listed_after_its_last_commit(writer, watch, make_batch, monkeypatch):
    """Also where the last writer died before it told of its commit."""
    watch.news()
    monkeypatch.setattr("raydfkd.data.commit_log.tell_of_change", lambda store: None)
    made = commit(writer, UNITS[0], make_batch)
    writer.close("plan")
    assert watch.news().committed == {made.unit}


def test_store_that_throttles_writes_of_one_object_keeps_no_writer_waiting():
    plan = uuid.uuid4().hex
    faults = PLANS[plan] = Faults(refused=1.0)
    news.tell_of_change(Store(f"faulty://{plan}/set", {"plan": plan}))
    assert faults.counts["refused"] == 1
