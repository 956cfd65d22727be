from __future__ import annotations

import os
import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from raydfkd.data.store import Store
from raydfkd.registry import RecipeError


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
    view = store.view("a")
    store.put("a", b"another")
    assert bytes(view) == content
    store.delete("a")
    assert bytes(view) == content


def test_view_of_a_missing_object_names_it(uri):
    with pytest.raises(FileNotFoundError, match=re.escape(f"{uri}/folder/a.json does not exist")):
        Store(uri).view("folder/a.json")


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


def test_failed_local_write_leaves_no_temporary_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        Store(str(tmp_path)).put("a", b"data")
    assert files_under(tmp_path) == []


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


def test_probe_refuses_a_file_system_that_overwrites_where_it_should_refuse(uri, monkeypatch):
    store = Store(uri)
    monkeypatch.setattr(type(store._folder), "put_new", lambda folder, path, data: folder.put(path, data) or True)
    with pytest.raises(RecipeError, match="ignores create-only writes"):
        store.probe()


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
