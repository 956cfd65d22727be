from __future__ import annotations

import logging
import os
import pickle
import re
import resource
import threading
import time
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faulty import PLANS, Script

from raydfkd.errors import RecipeError
from raydfkd.store import retry as failures
from raydfkd.store.errors import StoreError
from raydfkd.store.store import Store


def files_under(folder):
    return sorted(path.name for path in folder.rglob("*"))


def test_object_reads_back_as_it_was_last_put(uri):
    store = Store(uri)
    store.put("folder/a.json", b"one")
    store.put("folder/a.json", b"two")
    assert store.get("folder/a.json") == b"two"


def test_missing_object_is_named(uri):
    with pytest.raises(FileNotFoundError, match=re.escape(f"{uri}/folder/a.json does not exist")):
        Store(uri).get("folder/a.json")


@pytest.mark.parametrize("content", [b"one", b""])
def test_view_has_the_bytes_of_the_object_even_after_it_is_replaced(content, uri):
    store = Store(uri)
    store.put("a", content)
    view = store.view("a", at_most=100)
    store.put("a", b"another")
    assert bytes(view) == content
    store.delete("a")
    assert bytes(view) == content


def test_object_is_read_up_to_the_bytes_that_it_may_have_and_refused_beyond(uri):
    store = Store(uri)
    for data in (b"", b"1234"):
        store.put("a", data)
        assert store.get("a", at_most=4) == bytes(store.view("a", at_most=4)) == data
    store.put("a", b"12345")
    for read in (store.get, store.view):
        with pytest.raises(ValueError, match="it has more than 4 bytes"):
            read("a", at_most=4)
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        store.get("missing", at_most=4)


def test_view_of_a_missing_object_names_it(uri):
    with pytest.raises(FileNotFoundError, match=re.escape(f"{uri}/folder/a.json does not exist")):
        Store(uri).view("folder/a.json", at_most=100)


def test_put_new_writes_the_first_time_and_changes_nothing_the_second(uri):
    store = Store(uri)
    assert store.put_new("a", b"first")
    assert not store.put_new("a", b"second")
    assert store.get("a") == b"first"


def test_of_racing_writers_exactly_one_creates_the_object(uri):
    store, writers = Store(uri), 8
    barrier = threading.Barrier(writers)

    def create(path, writer):
        barrier.wait()
        return store.put_new(path, str(writer).encode())

    with ThreadPoolExecutor(writers) as pool:
        for path in ("a", "b", "c", "d", "e"):
            won = list(pool.map(create, [path] * writers, range(writers)))
            assert won.count(True) == 1
            assert store.get(path) == str(won.index(True)).encode()


@pytest.mark.parametrize("write", ["put", "put_new"])
def test_local_readers_never_see_part_of_an_object(write, tmp_path):
    store, data = Store(str(tmp_path)), b"x" * 2_000_000
    done = threading.Event()

    def poll():
        seen = set()
        while not done.is_set():
            seen.update(len(store.get(path)) for path in store.list(""))
        return seen

    with ThreadPoolExecutor(1) as pool:
        seen = pool.submit(poll)
        for number in range(10):
            getattr(store, write)(f"object-{number}", data)
        done.set()
        assert seen.result() <= {len(data)}


@pytest.fixture
def scripted(monkeypatch):
    """Makes a store whose operations fail as told, and its faults."""
    monkeypatch.setattr(failures, "_FIRST_WAIT_S", 0.0)

    def make(*kinds):
        plan = uuid.uuid4().hex
        PLANS[plan] = Script(*kinds)
        return Store(f"faulty://{plan}/set", {"plan": plan}), PLANS[plan]

    return make


@pytest.mark.parametrize("fault", ["refused", "timeout", "lost"])
def test_operations_on_objects_are_done_again_when_an_error_passes(fault, scripted):
    for act, expected in (
        (lambda store: store.put("a", b"new"), {"a": b"new"}),
        (lambda store: store.put_new("b", b"new"), {"a": b"old", "b": b"new"}),
        (lambda store: store.get("a") == b"old" or pytest.fail("other bytes"), {"a": b"old"}),
        (lambda store: store.exists("a") or pytest.fail("not there"), {"a": b"old"}),
        (lambda store: store.exists("b") and pytest.fail("there"), {"a": b"old"}),
        (lambda store: store.list("") == ["a"] or pytest.fail("other list"), {"a": b"old"}),
        (lambda store: store.delete("a"), {}),
    ):
        store, faults = scripted(None, fault, fault)
        store.put("a", b"old")
        act(store)
        assert faults.counts.total() == 0
        assert {path: store.get(path) for path in store.list("")} == expected


def test_write_that_left_half_an_object_is_done_again(scripted):
    store, _ = scripted("partial", "partial")
    store.put("a", b"whole")
    assert store.get("a") == b"whole"


def test_create_whose_answer_was_lost_says_false_and_has_written_our_bytes(scripted):
    store, _ = scripted("lost")
    assert not store.put_new("a", b"own")
    assert store.get("a") == b"own"


def test_create_that_was_refused_and_then_done_says_true(scripted):
    store, _ = scripted("refused", None, "refused")
    assert store.put_new("a", b"own")
    assert not store.put_new("a", b"other")


@pytest.mark.parametrize(
    ("act", "verb"),
    [
        (lambda store: store.put("a", b"x"), "written"),
        (lambda store: store.put_new("a", b"x"), "written"),
        (lambda store: store.get("a"), "read"),
        (lambda store: store.view("a", at_most=100), "read"),
        (lambda store: store.exists("a"), "read"),
        (lambda store: store.list("a"), "listed"),
        (lambda store: store.entries("a"), "listed"),
        (lambda store: store.delete("a"), "deleted"),
    ],
)
def test_operation_that_keeps_failing_is_one_line_with_object_and_reason(act, verb, scripted):
    store, _ = scripted(*["refused"] * 100)
    with pytest.raises(StoreError) as caught:
        act(store)
    assert str(caught.value) == (
        f"{store.uri}/a cannot be {verb} (Please reduce your request rate.; tried again and again)"
    )


def test_attempts_are_logged_with_the_reason(scripted, caplog):
    caplog.set_level(logging.INFO, "raydfkd")
    store, _ = scripted("refused")
    store.put("a", b"x")
    (record,) = caplog.records
    assert record.getMessage() == f"{store.uri}/a was not written (Please reduce your request rate.); again in 0.0 s"


@pytest.mark.parametrize("write", ["put", "put_new"])
def test_disk_that_fills_up_is_named_and_nothing_half_written_stays(write, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError) as caught:
        getattr(Store(str(tmp_path)), write)("parts/a", b"data")
    assert str(caught.value) == f"{tmp_path}/parts/a cannot be written (No space left on device)"
    assert files_under(tmp_path) == ["parts"]


@pytest.mark.parametrize("write", ["put", "put_new"])
def test_write_that_the_system_ends_half_way_leaves_the_old_object_only(write, tmp_path):
    store, limits = Store(str(tmp_path)), resource.getrlimit(resource.RLIMIT_FSIZE)
    store.put("old", b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StoreError, match=r"cannot be written \(File too large\)$"):
            getattr(store, write)("old" if write == "put" else "new", b"x" * 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_under(tmp_path) == ["old"]
    assert store.get("old") == b"old"


def test_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    with pytest.raises(StoreError, match=r"^/proc/x/a cannot be written \(No such file or directory\)$"):
        Store("/proc/x").put("a", b"x")

    def read_only(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "open", read_only)  # a mode would not keep root out
    with pytest.raises(StoreError) as caught:
        Store(str(tmp_path)).put("a", b"x")
    assert str(caught.value) == f"{tmp_path}/a cannot be written (Read-only file system)"
    assert files_under(tmp_path) == []


@pytest.mark.parametrize("path", ["../a", "a/../../b", "/etc/passwd", "a\\b", "..\\a", "a\0b"])
def test_path_that_leads_out_of_the_folder_is_refused(path, uri):
    store = Store(uri)
    for act in (store.get, store.view, store.exists, store.list, store.entries, store.delete):
        with pytest.raises(ValueError, match="not a path in a store"):
            act(path)
    for act in (store.put, store.put_new):
        with pytest.raises(ValueError, match="not a path in a store"):
            act(path, b"x")


def test_entries_have_sizes_and_times_of_all_objects_in_a_folder(uri):
    store = Store(uri)
    assert store.entries("parts") == ()
    before = store.now()
    for path in ("parts/b", "parts/.a.0", "parts/deep/c", "d"):
        store.put(path, b"four")
    found = store.entries("parts")
    assert [(entry.path, entry.bytes) for entry in found] == [("parts/.a.0", 4), ("parts/b", 4)]
    assert all(before <= entry.modified <= store.now() for entry in found)
    assert [entry.path for entry in store.entries("")] == ["d"]


@pytest.mark.parametrize("skew_s", [-86400, 86400])
def test_time_is_that_of_the_store_whatever_the_clock_here_says(skew_s, tmp_path, monkeypatch):
    real = time.time()
    monkeypatch.setattr(time, "time", lambda: real + skew_s)
    assert abs(Store(str(tmp_path)).now() - real) < 60


def test_list_has_files_directly_under_the_folder_sorted_and_as_they_are_now(uri):
    store = Store(uri)
    assert store.list("commits") == []
    for path in ("commits/b", "commits/a", "commits/deep/c", "commits/.temporary", "other"):
        store.put(path, b"x")
        store.list("commits")
    assert store.list("commits") == ["commits/a", "commits/b"]
    store.delete("commits/a")
    assert store.list("commits") == ["commits/b"]


def test_deleting_what_is_not_there_is_fine(uri):
    store = Store(uri)
    store.put("a", b"x")
    store.delete("a")
    store.delete("a")
    assert not store.exists("a")


def test_pickled_store_means_the_same_place_in_another_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store("runs/set")
    store.put("a", b"x")
    copy = pickle.dumps(store)
    monkeypatch.chdir("/")
    assert pickle.loads(copy).get("a") == b"x"


def test_file_uri_and_plain_path_are_the_same_place(tmp_path):
    Store(f"file://{tmp_path}/set").put("a", b"x")
    assert Store(f"{tmp_path}/set/").get("a") == b"x"


def test_probe_leaves_nothing_behind(uri, tmp_path):
    store = Store(uri)
    store.probe()
    assert store.list("") == []
    assert files_under(tmp_path) == []


@pytest.mark.parametrize("creates", ["always", "never"])
def test_probe_refuses_a_store_without_create_only_writes_and_says_what_to_do(creates):
    plan = uuid.uuid4().hex
    PLANS[plan] = Script(creates=creates)
    store = Store(f"faulty://{plan}/set", {"plan": plan})
    with pytest.raises(RecipeError) as caught:
        store.probe()
    assert str(caught.value) == (
        f"transfer_set.uri is faulty://{plan}/set: cannot create an object only once, so two workers could commit the "
        "same unit; give a URI on a local disk, S3 or Google Cloud Storage"
    )
    assert store.list("") == []


def test_probe_refuses_a_disk_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(RecipeError, match="same unit; give a URI on a local disk"):
        Store(str(tmp_path)).probe()
    Store(str(tmp_path)).probe(once=False)
    assert files_under(tmp_path) == []


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("/proc/x", "No such file or directory"),
        ("foo://x/y", "Protocol not known: foo"),
        ("{tmp_path}/file/set", "{tmp_path}/file is a file"),
    ],
)
def test_place_that_cannot_be_written_is_named_with_the_reason(uri, reason, tmp_path):
    (tmp_path / "file").touch()
    uri, reason = uri.format(tmp_path=tmp_path), reason.format(tmp_path=tmp_path)
    with pytest.raises(RecipeError) as caught:
        Store(uri).probe()
    assert str(caught.value) == (
        f"transfer_set.uri is {uri}: cannot be written ({reason}); give a URI this machine can write to"
    )


def test_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch):
    def not_installed(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.url_to_fs", not_installed)
    with pytest.raises(RecipeError) as caught:
        Store("s3://bucket/set").probe()
    assert str(caught.value) == (
        "transfer_set.uri is s3://bucket/set: cannot be opened (Install s3fs to access S3); pip install 'raydfkd[s3]'"
    )


def test_secrets_are_in_no_error_and_no_repr(monkeypatch):
    def refuse(*_, **__):
        raise ValueError("cannot log in as key-0123 with hunter22 at http://127.0.0.1:9000")

    monkeypatch.setattr("fsspec.url_to_fs", refuse)
    options = {"key": "key-0123", "secret": "hunter22", "endpoint_url": "http://127.0.0.1:9000"}
    store = Store("ftp://user:hunter33@host/set", options)
    with pytest.raises(RecipeError) as caught:
        store.probe()
    assert "cannot log in as *** with *** at http://127.0.0.1:9000" in str(caught.value)
    for text in (str(caught.value), repr(store)):
        assert not re.search("key-0123|hunter", text)


def test_secrets_are_nowhere_in_what_a_failing_operation_says(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG, "raydfkd")
    monkeypatch.setattr(failures, "_FIRST_WAIT_S", 0.0)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "hunter-token")

    def refuse(*_, **__):
        raise ConnectionError("s3://user:hunter33@host rejects key-0123, hunter22, hunter-44 and hunter-token")

    monkeypatch.setattr("fsspec.url_to_fs", refuse)
    options = {"key": "key-0123", "secret": "hunter22", "client_kwargs": {"tokens": ["hunter-44"]}}
    store = Store("s3://user:hunter33@host/set", options)
    said = [repr(store), str(store)]
    for act in (store.get, store.exists, store.list, store.entries, store.delete, lambda path: store.put(path, b"x")):
        with pytest.raises(StoreError, match=r"^s3://\*\*\*@host/set/a cannot be") as caught:
            act("a")
        said += [str(caught.value), repr(caught.value), "".join(traceback.format_exception(caught.value))]
    said.append(caplog.text)
    assert "was not read" in caplog.text
    for text in said:
        assert not re.search("key-0123|hunter", text)


def test_store_that_cannot_be_pickled_shows_no_secret():
    store = Store("memory://x", {"secret": "hunter22", "session": threading.Lock()})
    with pytest.raises(TypeError) as caught:
        pickle.dumps(store)
    assert "hunter22" not in "".join(traceback.format_exception(caught.value))
