"""A transfer set may come from a stranger, and its options hold secrets."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import re
import sys
import traceback
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
from toy import encode_part

from raydfkd.checkpoints import read_checkpoint
from raydfkd.data.commits import GROUP_BYTES, RECORD_BYTES
from raydfkd.data.epochs import EpochLog
from raydfkd.data.garbage import collect_garbage
from raydfkd.data.news import Watch
from raydfkd.data.student_versions import StudentVersions
from raydfkd.data.transfer_set import TransferSet
from raydfkd.errors import RecipeError
from raydfkd.store import retry as failures
from raydfkd.store.errors import DamagedError
from raydfkd.store.store import Store
from raydfkd.synthesis.checkpoint import UnitCheckpoint
from raydfkd.units import Request, WorkUnit

DIGEST = "d" * 64


class Bomb:
    """Leaves a mark when somebody unpickles it."""

    def __reduce__(self):
        return exec, ("import sys; sys.raydfkd_was_here = True",)


@pytest.fixture
def strangers_set(uri):
    """A set to which anybody can add: ``put_commit`` makes a record that names a part of the given bytes."""
    made = TransferSet(uri, digest=DIGEST)
    made.create()
    made.put_commit = lambda data, **changes: put_commit(made, data, **changes)
    yield made
    assert not vars(sys).pop("raydfkd_was_here", False)


def put_commit(transfer_set, data, **changes):
    transfer_set.store.put("parts/u-1-00000000-0000.parquet", data)
    digest = xxhash.xxh3_128_hexdigest(data)
    part = {"path": "parts/u-1-00000000-0000.parquet", "rows": 2, "bytes": len(data), "xxh3": digest}
    record = {"unit": "u", "attempt": 1, "seed": 1, "images": 2, "parts": [part], "content": digest}
    rest = {"objective": 1.0, "student_version": -1, "seconds": 1.0, "curve": []}
    transfer_set.store.put("commits/u.json", json.dumps({**record, **rest, **changes}).encode())


def test_pickle_in_place_of_a_part_is_refused_and_runs_no_code(strangers_set):
    strangers_set.put_commit(pickle.dumps(Bomb()))
    (commit,) = strangers_set.snapshot().commits
    with pytest.raises(DamagedError, match="is not a part of a transfer set"):
        strangers_set.read(commit.parts[0])


READERS = {
    "set.json": lambda transfer_set: transfer_set.check(),
    "recipe.json": lambda transfer_set: TransferSet(
        transfer_set.store._location, digest="e" * 64, made_of={"seed": 1}
    ).check(),
    "commits/u.json": lambda transfer_set: transfer_set.snapshot(),
    "quarantine/u.json": lambda transfer_set: transfer_set._log.reason("u"),
    "closed/u.json": lambda transfer_set: transfer_set.is_closed("u"),
    "changed": lambda transfer_set: Watch(transfer_set.store, transfer_set.progress).news(),
    "packs/u.json": lambda transfer_set: transfer_set._log._packs.read(),
    "resume/u.pt": lambda transfer_set: UnitCheckpoint(transfer_set.store, UNIT, DIGEST).load(),
    "epochs-0123456789abcdef/000000.begun.json": lambda transfer_set: EpochLog(
        transfer_set.store, "0123456789abcdef"
    ).read(0),
    "students/000000001.safetensors": lambda transfer_set: StudentVersions(transfer_set.store).newest(-1),
}
UNIT = WorkUnit(id="u", request=Request(classes=(0,), images_per_class=1, seed=0, class_seeds=(0,)))


class Watched(Store):
    """Notes what is read of it."""

    seen: ClassVar[set[str]] = set()

    def get(self, path, **limits):
        self.seen.add(path)
        return super().get(path, **limits)

    def exists(self, path):
        self.seen.add(path)
        return super().exists(path)


@pytest.mark.parametrize("place", READERS)
def test_pickle_in_place_of_a_record_runs_no_code(place, strangers_set, monkeypatch):
    strangers_set.store.put(place, pickle.dumps(Bomb()))
    monkeypatch.setattr("raydfkd.data.transfer_set.Store", Watched)
    monkeypatch.setattr(Watched, "seen", set())
    watched = TransferSet(strangers_set.store._location, digest=DIGEST)
    with contextlib.suppress(RecipeError, ValueError):
        READERS[place](watched)
    assert place in Watched.seen, "else this shows nothing"
    with contextlib.suppress(RecipeError):
        collect_garbage(watched, older_than_s=0.0, dry_run=True)


def test_pickle_in_place_of_a_state_to_resume_from_is_refused():
    with pytest.raises(ValueError, match="UnpicklingError"):
        read_checkpoint(pickle.dumps(Bomb()))
    bomb = io.BytesIO()
    torch.save({"digest": DIGEST, "state": Bomb()}, bomb)
    with pytest.raises(ValueError, match="UnpicklingError"):
        read_checkpoint(bomb.getvalue())
    assert not hasattr(sys, "raydfkd_was_here")


def test_pickle_in_place_of_a_pack_runs_no_code_and_the_records_are_read_instead(strangers_set, monkeypatch):
    monkeypatch.setattr("raydfkd.data.commit_log.PACK", 1)
    strangers_set.put_commit(b"xx")
    bomb = pickle.dumps(Bomb())
    strangers_set.store.put(f"packs/{xxhash.xxh3_128_hexdigest(bomb)}.json", bomb)
    assert strangers_set.snapshot().units == ("u",)


def test_part_with_columns_that_carry_code_is_refused(strangers_set, make_batch):
    honest = encode_part([make_batch(2)], unit="u", seed=1, first_index=0)
    table = pq.read_table(io.BytesIO(honest))
    bomb = pa.array([pickle.dumps(Bomb())] * 2)
    extension = table.append_column(
        pa.field("bomb", bomb.type, metadata={"ARROW:extension:name": "arrow.py_extension_type"}), bomb
    )
    renamed = table.replace_schema_metadata({"pandas": pickle.dumps(Bomb())})
    for changed in (extension, renamed):
        data = io.BytesIO()
        pq.write_table(changed, data)
        strangers_set.put_commit(data.getvalue())
        (part,) = TransferSet(strangers_set.store._location, digest=DIGEST).snapshot().commits[0].parts
        with pytest.raises(DamagedError, match="is not a part of a transfer set: it has"):
            strangers_set.read(part)


def test_commit_names_no_file_outside_the_parts(strangers_set, make_batch):
    for path in ("../secret.parquet", "/etc/passwd", "parts/../set.json", "parts\\x.parquet", "parts/a\0.parquet"):
        part = {"path": path, "rows": 2, "bytes": 2, "xxh3": "0" * 32}
        strangers_set.put_commit(b"x", parts=[part])
        assert TransferSet(strangers_set.store._location, digest=DIGEST).snapshot().commits == ()
        for folder in ("quarantine", "commits"):
            for record in strangers_set.store.list(folder):
                strangers_set.store.delete(record)


@pytest.mark.parametrize(
    ("claim", "problem"),
    [
        ({"rows": 10**13, "bytes": 10**13}, "parts.0.rows: Input should be less than or equal to 33554432"),
        ({"rows": GROUP_BYTES + 1, "bytes": 10**13}, "parts.0.rows: Input should be less than or equal to 33554432"),
        ({"rows": 3, "bytes": 2}, "parts/u-1-00000000-0000.parquet claims 3 rows in 2 bytes"),
    ],
)
def test_commit_that_claims_more_rows_than_a_part_can_hold_is_refused_unread(claim, problem, strangers_set, caplog):
    part = {"path": "parts/u-1-00000000-0000.parquet", "xxh3": "0" * 32, **claim}
    strangers_set.put_commit(b"x", parts=[part], images=claim["rows"])
    assert strangers_set.snapshot().commits == ()
    assert strangers_set.damaged() == {"u"}
    assert problem in caplog.text


@pytest.mark.parametrize("place", ["set.json", "recipe.json", "commits/u.json", "quarantine/u.json", "changed"])
def test_object_of_absurd_size_is_not_fetched_whole(place, strangers_set, monkeypatch):
    store = strangers_set.store
    store.put(place, b" " * (3 * RECORD_BYTES))
    fetched, get = [], store._folder.get
    monkeypatch.setattr(store._folder, "get", lambda *args: fetched.append(get(*args)) or fetched[-1])
    for act in (
        strangers_set.check,
        TransferSet(store._location, digest="e" * 64, made_of={"seed": 1}).check,
        strangers_set.snapshot,
        lambda: list(strangers_set.verify()),
        lambda: Watch(store, strangers_set.progress).news(),
    ):
        with contextlib.suppress(RecipeError):
            act()
    assert max(map(len, fetched)) <= RECORD_BYTES + 1


def test_set_json_of_absurd_size_is_refused_in_one_line(strangers_set):
    strangers_set.store.put("set.json", b" " * (RECORD_BYTES + 1))
    with pytest.raises(RecipeError, match=r"is not a transfer set's \(it has more than 4,194,304 bytes\)"):
        strangers_set.check()


def test_secrets_of_a_set_are_in_no_text_about_it(monkeypatch, caplog):
    monkeypatch.setattr(failures, "_FIRST_WAIT_S", 0.0)

    def refuse(*_, **__):
        raise ConnectionError("key-0123 with hunter22 and hunter33 is not welcome")

    monkeypatch.setattr("fsspec.url_to_fs", refuse)
    options = {"key": "key-0123", "secret": "hunter22", "client_kwargs": {"aws_session_token": "hunter33"}}
    transfer_set = TransferSet("s3://bucket/set", digest=DIGEST, storage_options=options)
    said = [repr(transfer_set), repr(transfer_set.store)]
    for act in (transfer_set.create, transfer_set.check, transfer_set.snapshot, transfer_set.committed):
        with pytest.raises((OSError, RecipeError)) as caught:
            act()
        said.append("".join(traceback.format_exception(caught.value)))
    transfer_set.unpicklable = (value for value in ())
    with pytest.raises(TypeError) as caught:
        pickle.dumps(transfer_set)
    said += ["".join(traceback.format_exception(caught.value)), caplog.text]
    assert "*** with *** and *** is not welcome" in said[2]
    assert not any(re.search("key-0123|hunter", text) for text in said)
