from __future__ import annotations

import json
import math
import pickle
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import xxhash
from toy import encode_part

from raydfkd.data.commits import GROUP_BYTES, Commit, DamageRecord, Snapshot
from raydfkd.data.encodings import Encoding
from raydfkd.data.logits import completed, largest
from raydfkd.data.shards import rows_digest
from raydfkd.data.sink import WAITING
from raydfkd.data.transfer_set import TransferSet
from raydfkd.errors import RecipeError
from raydfkd.store.errors import DamagedError
from raydfkd.units import plan_units

UNITS = plan_units(seed=1, classes=range(3), images_per_class=4, classes_per_unit=1, images_per_class_per_unit=4)
DIGEST, OTHER = "d" * 64, "e" * 64
COLUMNS = ("images", "labels", "teacher_logits")


@pytest.fixture
def transfer_set(uri):
    made = TransferSet(uri, digest=DIGEST, part_rows=4)
    made.create()
    return made


def filled(sink, *batches):
    for batch in batches:
        sink.write(batch)
    return sink


def commit(transfer_set, unit, *batches, attempt=1):
    return filled(transfer_set.open(unit, attempt=attempt), *batches).commit(seconds=1.0)


def wait_until(is_true):
    """For what another thread does; a second is plenty for it."""
    for _ in range(1000):
        if is_true():
            return
        time.sleep(0.001)
    raise AssertionError("did not happen within a second")


class SlowPut:
    """Lets ``Store.put`` write a part only when told to."""

    def __init__(self, store, monkeypatch):
        self.begun, self.allowed = threading.Event(), threading.Event()
        self._put = store.put
        monkeypatch.setattr(store, "put", self)

    def __call__(self, path, data, **how):
        self.begun.set()
        assert self.allowed.wait(5)
        self._put(path, data, **how)


def test_committed_rows_read_back_as_they_were_written(transfer_set, make_batch):
    batches = [make_batch(3), make_batch(6)]
    made = commit(transfer_set, UNITS[0], *batches)
    read = [transfer_set.read(part) for part in made.parts]
    for name in ("images", "labels", "teacher_logits"):
        written = torch.cat([getattr(batch, name) for batch in batches])
        torch.testing.assert_close(torch.cat([getattr(rows, name) for rows in read]), written, rtol=0, atol=0)


def test_commit_says_what_is_in_the_unit(transfer_set, make_batch):
    batches = [make_batch(3, objective=1.0), make_batch(6, objective=4.0, student_version=5)]
    sink = filled(transfer_set.open(UNITS[0], attempt=2), *batches)
    made = sink.commit(seconds=2.5)
    assert (made.unit, made.attempt, made.seed) == (UNITS[0].id, 2, UNITS[0].request.seed)
    assert (made.images, [part.rows for part in made.parts]) == (9, [4, 4, 1])
    assert (made.objective, made.student_version, made.seconds) == (3.0, 5, 2.5)
    assert made.content == rows_digest(batches)


def test_parts_are_invisible_until_the_unit_is_committed(transfer_set, make_batch):
    sink = filled(transfer_set.open(UNITS[0]), make_batch(9))
    wait_until(lambda: len(transfer_set.store.list("parts")) == 2)
    assert transfer_set.committed() == set()
    assert transfer_set.snapshot().images == 0
    sink.commit(seconds=1.0)
    assert transfer_set.committed() == {UNITS[0].id}
    assert transfer_set.snapshot().images == 9


def test_second_commit_of_a_unit_changes_nothing_and_leaves_no_orphan(transfer_set, make_batch):
    batch = make_batch(9)
    first = commit(transfer_set, UNITS[0], batch)
    assert commit(transfer_set, UNITS[0], batch, attempt=2) == first
    assert transfer_set.snapshot().commits == (first,)
    assert transfer_set.store.list("parts") == sorted(part.path for part in first.parts)


def test_committing_the_same_sink_twice_is_harmless(transfer_set, make_batch):
    sink = filled(transfer_set.open(UNITS[0]), make_batch(5))
    assert sink.commit(seconds=1.0) == sink.commit(seconds=1.0)
    assert len(transfer_set.read(transfer_set.snapshot().commits[0].parts[0])) == 4


def test_of_two_attempts_that_finish_at_once_one_wins_and_the_other_vanishes(transfer_set, make_batch):
    for unit in UNITS:
        sinks = [filled(transfer_set.open(unit, attempt=attempt), make_batch(5)) for attempt in (1, 2)]
        barrier = threading.Barrier(2)

        def finish(sink, barrier=barrier):
            barrier.wait()
            return sink.commit(seconds=1.0)

        with ThreadPoolExecutor(2) as pool:
            one, other = pool.map(finish, sinks)
        assert one == other
    commits = transfer_set.snapshot().commits
    assert transfer_set.store.list("parts") == sorted(part.path for made in commits for part in made.parts)


def test_commit_whose_answer_was_lost_keeps_its_parts(transfer_set, make_batch, monkeypatch):
    put_new = transfer_set.store.put_new
    monkeypatch.setattr(transfer_set.store, "put_new", lambda *args: put_new(*args) and put_new(*args))
    made = commit(transfer_set, UNITS[0], make_batch(5))
    assert [len(transfer_set.read(part)) for part in made.parts] == [4, 1]


def test_attempt_abandoned_after_its_commit_was_sent_keeps_its_parts(transfer_set, make_batch, monkeypatch):
    put_new = transfer_set.store.put_new

    def disconnect(*args):
        put_new(*args)
        raise ConnectionError("no answer")

    monkeypatch.setattr(transfer_set.store, "put_new", disconnect)
    sink = filled(transfer_set.open(UNITS[0]), make_batch(5))
    with pytest.raises(ConnectionError):
        sink.commit(seconds=1.0)
    sink.abandon()
    (made,) = transfer_set.snapshot().commits
    assert [len(transfer_set.read(part)) for part in made.parts] == [4, 1]


def test_abandoned_attempt_leaves_nothing(transfer_set, make_batch):
    filled(transfer_set.open(UNITS[0]), make_batch(9)).abandon()
    assert transfer_set.store.list("parts") == []
    assert transfer_set.committed() == set()


@pytest.mark.parametrize("is_alive", [False, True])
def test_parts_of_the_attempt_that_was_gone_on_from_are_deleted_unless_it_was_first(is_alive, transfer_set, make_batch):
    batches = [make_batch(5), make_batch(3)]
    old, new = (transfer_set.open(UNITS[0], attempt=attempt) for attempt in (1, 2))
    old.write(batches[0])
    new.load_state_dict(old.state_dict())
    (inherited,) = set(transfer_set.store.list("parts")) & {part.path for part in old._parts}
    if is_alive:
        filled(old, batches[1]).commit(seconds=1.0)
    else:
        old.release()
    made = filled(new, batches[1]).commit(seconds=1.0)
    assert (inherited in [part.path for part in made.parts]) == is_alive
    assert transfer_set.store.list("parts") == sorted(part.path for part in made.parts)
    assert made.content == rows_digest(batches)


def test_unit_without_images_is_not_committed(transfer_set):
    with pytest.raises(ValueError, match=f"unit {UNITS[0].id} has no images"):
        commit(transfer_set, UNITS[0])


def test_rows_that_are_too_few_for_a_part_are_counted(transfer_set, make_batch):
    sink = transfer_set.open(UNITS[0])
    held = []
    for count in (3, 3, 10, 1, 1):
        sink.write(make_batch(count))
        held.append(sink.num_buffered)
    assert held == [3, 2, 0, 1, 2]


def test_images_are_taken_while_a_part_is_being_stored_until_too_many_wait(transfer_set, make_batch, monkeypatch):
    slow = SlowPut(transfer_set.store, monkeypatch)
    sink = transfer_set.open(UNITS[0])
    batches = [make_batch(4) for _ in range(WAITING + 2)]
    for batch in batches[:-1]:
        sink.write(batch)
    assert slow.begun.wait(5)
    last = threading.Thread(target=sink.write, args=[batches[-1]])
    last.start()
    last.join(0.05)
    assert last.is_alive()
    slow.allowed.set()
    last.join(5)
    made = sink.commit(seconds=1.0)
    assert (made.images, made.content) == (4 * len(batches), rows_digest(batches))


def test_part_has_the_bytes_that_its_rows_encode_to(transfer_set, make_batch):
    batches = [make_batch(3), make_batch(4)]
    first, second = commit(transfer_set, UNITS[0], *batches).parts
    whole = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in COLUMNS}
    for part, rows in ((first, slice(4)), (second, slice(4, 7))):
        pieces = [replace(batches[0], **{name: column[rows] for name, column in whole.items()})]
        index, seed = rows.start or 0, UNITS[0].request.seed
        assert transfer_set.store.get(part.path) == encode_part(pieces, unit=UNITS[0].id, seed=seed, first_index=index)


@pytest.mark.parametrize("act", ["write", "commit"])
def test_part_that_cannot_be_stored_fails_the_next_act_and_every_commit(act, transfer_set, make_batch, monkeypatch):
    tried = threading.Event()

    def refuse(path, data, **how):
        tried.set()
        raise OSError("disk full")

    sink = transfer_set.open(UNITS[0])
    monkeypatch.setattr(transfer_set.store, "put", refuse)
    sink.write(make_batch(4))
    assert tried.wait(5)
    monkeypatch.undo()
    if act == "write":
        with pytest.raises(OSError, match="disk full"):  # noqa: PT012 - whichever write comes after the failure
            for _ in range(WAITING + 2):
                sink.write(make_batch(1))
    for _ in range(2):
        with pytest.raises(OSError, match="disk full"):
            sink.commit(seconds=1.0)
    sink.abandon()
    assert transfer_set.store.list("parts") == []
    assert transfer_set.committed() == set()


def test_attempt_abandoned_while_a_part_is_being_stored_leaves_nothing(transfer_set, make_batch, monkeypatch):
    slow = SlowPut(transfer_set.store, monkeypatch)
    sink = filled(transfer_set.open(UNITS[0]), make_batch(4), make_batch(4))
    assert slow.begun.wait(5)
    threading.Timer(0.02, slow.allowed.set).start()
    sink.abandon()
    assert transfer_set.store.list("parts") == []


@pytest.mark.parametrize("end", ["commit", "abandon"])
def test_thread_of_a_sink_ends_with_its_attempt(end, transfer_set, make_batch):
    before = threading.active_count()
    sink = filled(transfer_set.open(UNITS[0]), make_batch(4))
    assert threading.active_count() == before + 1
    sink.commit(seconds=1.0) if end == "commit" else sink.abandon()
    assert threading.active_count() == before


def test_rows_stored_as_png_are_those_that_were_written(uri, make_batch):
    transfer_set = TransferSet(uri, digest=DIGEST, part_rows=4, encoding=Encoding(kind="png"))
    batches = [make_batch(3), make_batch(6)]
    made = commit(transfer_set, UNITS[0], *batches)
    read = [TransferSet(uri, digest=DIGEST).read(part) for part in made.parts]
    for name in COLUMNS:
        written = torch.cat([getattr(batch, name) for batch in batches])
        torch.testing.assert_close(torch.cat([getattr(rows, name) for rows in read]), written, rtol=0, atol=0)
    assert made.content == rows_digest(batches)


def test_rows_with_the_largest_logits_alone_are_read_beside_those_with_all_and_have_the_same_digest(uri, make_batch):
    batch = make_batch(5)
    few = TransferSet(uri, digest=DIGEST, part_rows=2, encoding=Encoding(kind="webp", quality=100, top_k=3))
    made = [commit(few, UNITS[0], batch), commit(TransferSet(uri, digest=DIGEST), UNITS[1], batch)]
    reader = TransferSet(uri, digest=DIGEST)
    first, second = ([reader.read(part) for part in one.parts] for one in made)
    assert torch.equal(torch.cat([rows.images for rows in first]), batch.images)
    logits = torch.cat([rows.teacher_logits for rows in first])
    torch.testing.assert_close(logits, completed(*largest(batch.teacher_logits, 3), 7), rtol=0, atol=0)
    torch.testing.assert_close(second[0].teacher_logits, batch.teacher_logits, rtol=0, atol=0)
    assert ([rows.top_k for rows in first], second[0].top_k) == ([3, 3, 3], None)
    assert made[0].content == made[1].content, "of the rows that were made"


def test_images_that_the_encoding_cannot_store_fail_the_commit(uri, make_batch):
    transfer_set = TransferSet(uri, digest=DIGEST, encoding=Encoding(kind="png"))
    sink = filled(transfer_set.open(UNITS[0]), replace(make_batch(2), images=torch.zeros(2, 2, 4, 5).byte()))
    with pytest.raises(ValueError, match="encoding png stores 1 or 3 channels, but images have 2; use raw"):
        sink.commit(seconds=1.0)


def test_parts_of_large_images_have_fewer_rows(transfer_set, make_batch):
    batch = make_batch(3)
    made = commit(transfer_set, UNITS[0], replace(batch, images=torch.zeros(3, 3, 2048, 2048, dtype=torch.uint8)))
    assert [part.rows for part in made.parts] == [GROUP_BYTES // (3 * 2048 * 2048), 1]


def test_digest_does_not_depend_on_order_batches_parts_or_attempts(tmp_path, make_batch):
    batches = {unit.id: make_batch(9) for unit in UNITS}
    one = TransferSet(str(tmp_path / "one"), digest=DIGEST, part_rows=4)
    other = TransferSet(str(tmp_path / "other"), digest=DIGEST, part_rows=100)
    for unit in UNITS:
        commit(one, unit, batches[unit.id])
    for unit in reversed(UNITS):
        whole = batches[unit.id]
        pieces = [
            replace(
                whole, images=whole.images[rows], labels=whole.labels[rows], teacher_logits=whole.teacher_logits[rows]
            )
            for rows in (slice(2), slice(2, 9))
        ]
        commit(other, unit, *pieces, attempt=3)
    assert one.content_digest() == other.content_digest()
    assert one.content_digest(within=[UNITS[0].id]) != one.content_digest()


def test_digest_changes_when_two_units_swap_their_images(tmp_path, make_batch):
    a, b = make_batch(4), make_batch(4)
    sets = [TransferSet(str(tmp_path / name), digest=DIGEST) for name in ("one", "other")]
    for made, contents in zip(sets, ((a, b), (b, a)), strict=True):
        for unit, batch in zip(UNITS, contents, strict=False):
            commit(made, unit, batch)
    assert sets[0].content_digest() != sets[1].content_digest()


@pytest.mark.parametrize("act", ["create", "check"])
def test_set_of_another_recipe_is_refused(act, uri):
    TransferSet(uri, digest=DIGEST).create()
    with pytest.raises(RecipeError) as caught:
        getattr(TransferSet(uri, digest=OTHER), act)()
    assert str(caught.value) == (
        f"transfer_set.uri is {uri}: holds a set of another recipe (digest dddddddddddd there and eeeeeeeeeeee here); "
        "use the recipe and --set of then, or give another uri"
    )


@pytest.mark.parametrize("act", ["create", "check"])
def test_set_of_another_recipe_is_refused_with_what_differs(act, uri):
    there = {"seed": 1, "synthesis": {"steps": 150, "objective": [{"name": "bn_moments", "weight": 1.0}]}}
    here = {"seed": 1, "synthesis": {"steps": 4, "objective": [{"name": "bn_moments", "weight": 0.5}]}}
    TransferSet(uri, digest=DIGEST, made_of=there).create()
    with pytest.raises(RecipeError) as caught:
        getattr(TransferSet(uri, digest=OTHER, made_of=here), act)()
    assert str(caught.value) == (
        f"transfer_set.uri is {uri}: holds a set of another recipe (synthesis.steps is 150 there and 4 here; "
        "synthesis.objective.bn_moments.weight is 1.0 there and 0.5 here); use the recipe and --set of then, or give "
        "another uri"
    )


def test_of_many_differences_between_recipes_the_first_are_named_and_the_rest_are_counted(uri):
    TransferSet(uri, digest=DIGEST, made_of={str(key): 0 for key in range(9)}).create()
    with pytest.raises(RecipeError, match="0 is 0 there and 1 here; 1 is .*; 2 is .* here, and 6 more\\)"):
        TransferSet(uri, digest=OTHER, made_of={str(key): 1 for key in range(9)}).check()


@pytest.mark.parametrize("content", [None, b"", b"[1]", b"null"])
def test_set_whose_recipe_json_is_missing_or_none_is_still_refused(content, uri):
    made = TransferSet(uri, digest=DIGEST, made_of={"seed": 1})
    made.create()
    made.store.delete("recipe.json")
    if content is not None:
        made.store.put("recipe.json", content)
    with pytest.raises(RecipeError, match="digest dddddddddddd there and eeeeeeeeeeee here"):
        TransferSet(uri, digest=OTHER, made_of={"seed": 2}).check()


def test_set_that_was_begun_before_recipes_were_written_beside_it_goes_on(transfer_set, uri, make_batch):
    commit(transfer_set, UNITS[0], make_batch(2))
    newer = TransferSet(uri, digest=DIGEST, made_of={"seed": 1})
    newer.create()
    assert newer.committed() == {UNITS[0].id}


def test_creating_a_set_again_goes_on_with_it(transfer_set, uri, make_batch):
    commit(transfer_set, UNITS[0], make_batch(2))
    again = TransferSet(uri, digest=DIGEST)
    again.create()
    assert again.committed() == {UNITS[0].id}


def test_checking_a_missing_set_is_fine_and_writes_nothing(uri, tmp_path):
    transfer_set = TransferSet(uri, digest=DIGEST)
    transfer_set.check()
    assert transfer_set.store.list("") == []
    assert list(tmp_path.iterdir()) == []


def test_set_is_read_by_its_place_alone_and_says_what_it_is_made_of(uri, make_batch):
    made = TransferSet(uri, digest=DIGEST, made_of={"seed": 3}, part_rows=4)
    made.create()
    commit(made, UNITS[0], make_batch(6))
    found = TransferSet.at(uri)
    assert (found.digest, found.made_of) == (DIGEST, {"seed": 3})
    assert [len(rows) for rows in found] == [4, 2]
    assert found.content_digest() == made.content_digest()


def test_place_without_a_set_is_not_taken_for_one(uri):
    with pytest.raises(RecipeError, match=r"there is no transfer set, for it has no set.json; `raydfkd synthesize`"):
        TransferSet.at(uri)
    TransferSet(uri, digest=DIGEST).store.put("set.json", b'{"format": 9, "digest": "x"}')
    with pytest.raises(RecipeError, match="format 9 and this raydfkd reads 1"):
        TransferSet.at(uri)


@pytest.mark.parametrize(
    ("header", "problem"),
    [(b"", "not a transfer set's"), (b'{"format": 9, "digest": "x"}', "format 9 and this raydfkd reads 1")],
)
def test_strange_set_json_is_refused(header, problem, transfer_set):
    transfer_set.store.put("set.json", header)
    with pytest.raises(RecipeError, match=problem):
        transfer_set.check()


def test_set_at_a_place_that_cannot_be_written_is_refused():
    with pytest.raises(RecipeError, match="transfer_set.uri is /proc/x: cannot be written"):
        TransferSet("/proc/x", digest=DIGEST).create()


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-1], lambda data: data.replace(b"PAR1", b"PAR2"), lambda _: b"", lambda data: 2 * data],
)
def test_damaged_part_is_named(damage, transfer_set, make_batch):
    (part,) = commit(transfer_set, UNITS[0], make_batch(4)).parts
    transfer_set.store.put(part.path, damage(transfer_set.store.get(part.path)))
    with pytest.raises(DamagedError, match=f"{part.path} is damaged") as caught:
        transfer_set.read(part)
    assert caught.value.path == part.path


def test_part_with_other_rows_than_committed_is_named(transfer_set, make_batch):
    (part,) = commit(transfer_set, UNITS[0], make_batch(4)).parts
    with pytest.raises(DamagedError, match=f"{part.path} has 4 rows, but 3 were committed"):
        transfer_set.read(replace(part, rows=3))


def test_removed_part_is_named(transfer_set, make_batch):
    (part,) = commit(transfer_set, UNITS[0], make_batch(4)).parts
    transfer_set.store.delete(part.path)
    with pytest.raises(DamagedError, match=f"{part.path} does not exist, but was committed"):
        transfer_set.read(part)


def test_part_that_is_no_parquet_is_named(transfer_set, make_batch):
    (part,) = commit(transfer_set, UNITS[0], make_batch(4)).parts
    transfer_set.store.put(part.path, b"garbage")
    with pytest.raises(DamagedError, match=f"{part.path} is not a part of a transfer set: it cannot be read"):
        transfer_set.read(replace(part, xxh3=xxhash.xxh3_128_hexdigest(b"garbage")))


def test_part_damaged_on_its_way_is_read_again(transfer_set, make_batch, monkeypatch):
    (part,) = commit(transfer_set, UNITS[0], make_batch(4)).parts
    view, answers = transfer_set.store.view, [lambda data: bytes(data)[:-1], bytes]
    monkeypatch.setattr(transfer_set.store, "view", lambda path, **limit: answers.pop(0)(view(path, **limit)))
    assert len(transfer_set.read(part)) == 4


def first_part(record, **changes):
    return {**record, "parts": [{**record["parts"][0], **changes}]}


@pytest.mark.parametrize(
    "change",
    [
        lambda record: [],
        lambda record: {**record, "extra": 1},
        lambda record: {key: value for key, value in record.items() if key != "content"},
        lambda record: {**record, "unit": "r000-c0001-0001"},
        lambda record: {**record, "unit": "../r000"},
        lambda record: {**record, "images": 3},
        lambda record: {**record, "images": "4"},
        lambda record: first_part(record, path="../x"),
        lambda record: first_part(record, path="parts/../../x.parquet"),
        lambda record: first_part(record, path="/etc/passwd"),
        lambda record: first_part(record, path="parts/a/b.parquet"),
        lambda record: first_part(record, path="parts/..\\a.parquet"),
        lambda record: first_part(record, path="parts/a\0.parquet"),
        lambda record: {**record, "images": 8, "parts": record["parts"] * 2},
        lambda record: {**record, "generation": 1},
        lambda record: {**record, "generation": -1},
        lambda record: first_part(record, rows="4"),
        lambda record: first_part(record, xxh3=""),
    ],
)
def test_garbage_commit_is_quarantined_and_left_out(change, transfer_set, make_batch, caplog):
    made, other = (commit(transfer_set, unit, make_batch(4)) for unit in UNITS[:2])
    path = f"commits/{made.unit}.json"
    transfer_set.store.put(path, json.dumps(change(json.loads(made.to_json()))).encode())
    assert transfer_set.snapshot().commits == (other,)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"unit {made.unit} is damaged and has to be made again: ")
    assert f"{transfer_set.store.uri}/{path} is not the record of a commit: " in record.getMessage()
    assert transfer_set.damaged() == {made.unit}
    assert transfer_set.committed() == {other.unit}


@pytest.mark.parametrize("garbage", [b"", b"{", b"\xff\xfe", b"null", b"[" * 100_000, b"\x80\x04K\x01."])
def test_commit_that_is_no_json_is_quarantined(garbage, transfer_set):
    transfer_set.store.put("commits/unit.json", garbage)
    assert transfer_set.snapshot().commits == ()
    assert transfer_set.damaged() == {"unit"}


def test_record_damaged_on_its_way_is_read_again(transfer_set, make_batch, monkeypatch):
    made = commit(transfer_set, UNITS[0], make_batch(4))
    get, answers = transfer_set.store.get, [lambda data: data[:-1], bytes]
    monkeypatch.setattr(transfer_set.store, "get", lambda path, **limit: answers.pop(0)(get(path, **limit)))
    assert transfer_set.snapshot().commits == (made,)


@pytest.mark.parametrize(
    "name", ["..json", "a b.json", "a@0.json", "a@1@1.json", "@1.json", "a@-1.json", "a.txt", "a@x.json"]
)
def test_object_that_has_no_record_s_name_is_not_ours(name, transfer_set):
    for folder in ("commits", "quarantine"):
        transfer_set.store.put(f"{folder}/{name}", b"x")
    assert transfer_set.committed() == transfer_set.damaged() == set()
    assert transfer_set.snapshot().commits == ()


@pytest.mark.parametrize(
    "header", [b'{"format": 2, "digest": "%s"}' % DIGEST.encode(), b'{"format": 1, "digest": "x"}']
)
def test_records_of_another_format_or_recipe_are_not_taken_for_damaged_ones(header, transfer_set):
    transfer_set.store.put("set.json", header)
    transfer_set.store.put("commits/unit.json", b'{"unit": "of another format"}')
    with pytest.raises(RecipeError, match="holds a set of"):
        transfer_set.snapshot()
    assert transfer_set.store.list("quarantine") == []


def damage_of(transfer_set, made):
    transfer_set.store.put(made.parts[0].path, b"damaged")
    with pytest.raises(DamagedError) as caught:
        transfer_set.read(made.parts[0])
    return caught.value


def test_quarantined_commit_is_out_of_the_set_and_its_unit_can_be_committed_again(transfer_set, uri, make_batch):
    batch, reader = make_batch(4), TransferSet(uri, digest=DIGEST)
    first, other = commit(transfer_set, UNITS[0], batch), commit(transfer_set, UNITS[1], make_batch(2))
    before = reader.content_digest()
    assert transfer_set.mark_damaged(first, damage_of(transfer_set, first))
    for each in (transfer_set, reader):
        assert each.snapshot().commits == (other,)
        assert each.committed() == {other.unit}
        assert each.damaged() == {first.unit}
    second = commit(transfer_set, UNITS[0], batch, attempt=2)
    assert (first.generation, second.generation) == (0, 1)
    assert transfer_set.store.list("commits") == sorted(
        f"commits/{name}.json" for name in (first.unit, f"{first.unit}@1", other.unit)
    )
    for each in (transfer_set, reader):
        assert each.snapshot().commits == (second, other)
        assert each.commit_of(first.unit) == second
        assert each.damaged() == set()
    assert reader.content_digest() == before


def test_commit_can_be_quarantined_again_and_again(transfer_set, make_batch):
    for generation in range(12):
        made = commit(transfer_set, UNITS[0], make_batch(4))
        assert made.generation == generation
        assert transfer_set.snapshot().commits == (made,)
        assert transfer_set.mark_damaged(made, damage_of(transfer_set, made))
        assert transfer_set.commit_of(made.unit) is None
    assert len(transfer_set.store.list("quarantine")) == 12


def test_late_reader_of_the_old_commit_does_not_quarantine_the_new_one(transfer_set, make_batch):
    first = commit(transfer_set, UNITS[0], make_batch(4))
    damage = damage_of(transfer_set, first)
    assert transfer_set.mark_damaged(first, damage)
    second = commit(transfer_set, UNITS[0], make_batch(4))
    assert not transfer_set.mark_damaged(first, damage)
    assert transfer_set.snapshot().commits == (second,)


def test_reader_of_a_set_that_was_deleted_does_not_quarantine_the_new_one(transfer_set, make_batch):
    old = commit(transfer_set, UNITS[0], make_batch(4))
    damage = damage_of(transfer_set, old)
    transfer_set.store.delete(f"commits/{old.unit}.json")
    assert not transfer_set.mark_damaged(old, damage)
    new = commit(transfer_set, UNITS[0], make_batch(4))
    assert not transfer_set.mark_damaged(old, damage)
    assert transfer_set.snapshot().commits == (new,)


def test_of_readers_that_quarantine_at_once_one_makes_the_record(transfer_set, make_batch):
    made = commit(transfer_set, UNITS[0], make_batch(4))
    damage, barrier = damage_of(transfer_set, made), threading.Barrier(8)

    def quarantine(_):
        barrier.wait()
        return transfer_set.mark_damaged(made, damage)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(quarantine, range(8))).count(True) == 1
    assert transfer_set.store.list("quarantine") == [f"quarantine/{made.unit}.json"]


def test_record_of_a_quarantine_says_what_is_damaged(transfer_set, make_batch):
    made = commit(transfer_set, UNITS[0], make_batch(4))
    damage = damage_of(transfer_set, made)
    transfer_set.mark_damaged(made, damage)
    record = DamageRecord.from_json(transfer_set.store.get(f"quarantine/{made.unit}.json"))
    assert record == DamageRecord(unit=made.unit, generation=0, path=made.parts[0].path, reason=damage.reason)


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_quarantine_whose_record_is_damaged_counts_all_the_same(content, transfer_set, make_batch):
    made = commit(transfer_set, UNITS[0], make_batch(4))
    transfer_set.mark_damaged(made, damage_of(transfer_set, made))
    transfer_set.store.put(f"quarantine/{made.unit}.json", content)
    assert transfer_set.snapshot().commits == ()
    assert transfer_set.damaged() == {made.unit}


def test_commit_that_is_quarantined_while_a_snapshot_is_taken_is_not_in_it(transfer_set, make_batch, monkeypatch):
    made = commit(transfer_set, UNITS[0], make_batch(4))
    damage, listed = damage_of(transfer_set, made), transfer_set.store.list

    def quarantined_after(prefix):
        found = listed(prefix)
        if prefix == "commits":
            transfer_set.mark_damaged(made, damage)
        return found

    monkeypatch.setattr(transfer_set.store, "list", quarantined_after)
    assert transfer_set.snapshot().commits == ()


@pytest.mark.parametrize("also_removed", [False, True])
def test_attempt_whose_generation_is_quarantined_while_it_commits_gets_the_next_one(
    also_removed, transfer_set, make_batch, monkeypatch
):
    first = commit(transfer_set, UNITS[0], make_batch(4))
    damage, put_new = damage_of(transfer_set, first), transfer_set.store.put_new
    sink = filled(transfer_set.open(UNITS[0], attempt=2), make_batch(4))

    def after_the_quarantine(path, data):
        monkeypatch.setattr(transfer_set.store, "put_new", put_new)
        transfer_set.mark_damaged(first, damage)
        if also_removed:
            transfer_set.store.delete(f"commits/{first.unit}.json")
        return put_new(path, data)

    monkeypatch.setattr(transfer_set.store, "put_new", after_the_quarantine)
    second = sink.commit(seconds=1.0)
    assert (second.attempt, second.generation) == (2, 1)
    assert transfer_set.snapshot().commits == (second,)
    assert sum(len(transfer_set.read(part)) for part in second.parts) == 4


def test_attempt_that_meets_a_garbage_commit_takes_its_place(transfer_set, make_batch):
    transfer_set.store.put(f"commits/{UNITS[0].id}.json", b"garbage")
    made = commit(transfer_set, UNITS[0], make_batch(4))
    assert made.generation == 1
    assert transfer_set.snapshot().commits == (made,)


def test_verify_says_of_every_unit_how_it_is_and_quarantines_what_is_damaged(transfer_set, uri, make_batch):
    commits = [commit(transfer_set, unit, make_batch(6)) for unit in UNITS]
    assert [(verdict.images, verdict.damage) for verdict in transfer_set.verify()] == [(6, None)] * 3
    transfer_set.store.delete(commits[0].parts[1].path)
    transfer_set.store.put(f"commits/{commits[2].unit}.json", b"garbage")
    reader = TransferSet(uri, digest=DIGEST)
    verdicts = {verdict.unit: verdict for verdict in reader.verify()}
    lost, sound, garbage = (verdicts.pop(unit.id) for unit in UNITS)
    assert verdicts == {}
    assert (lost.images, sound.images, garbage.images) == (4, 6, 0)
    assert lost.damage == f"{reader.store.uri}/{commits[0].parts[1].path} does not exist, but was committed"
    assert sound.damage is None
    assert f"commits/{commits[2].unit}.json is not the record of a commit" in garbage.damage
    assert reader.damaged() == {commits[0].unit, commits[2].unit}
    assert [verdict.unit for verdict in reader.verify()] == [commits[1].unit]


def test_verify_looks_only_at_the_wanted_units(transfer_set, make_batch):
    for unit in UNITS:
        commit(transfer_set, unit, make_batch(4))
    assert [verdict.unit for verdict in transfer_set.verify(within=[UNITS[1].id])] == [UNITS[1].id]


@pytest.mark.parametrize("within", [None, "some"])
def test_many_records_are_fetched_at_once_and_come_in_order(within, transfer_set, make_batch, monkeypatch):
    units = plan_units(seed=1, classes=range(40), images_per_class=1, classes_per_unit=1, images_per_class_per_unit=1)
    for unit in units:
        commit(transfer_set, unit, make_batch(1))
    wanted = sorted(unit.id for unit in (units if within is None else units[5:]))
    barrier, get = threading.Barrier(5), transfer_set.store.get
    monkeypatch.setattr(
        transfer_set.store, "get", lambda path, **limit: barrier.wait(5) is not None and get(path, **limit)
    )
    assert transfer_set.snapshot(within and wanted).units == tuple(wanted)


@pytest.mark.parametrize(
    "name", ["a/b", "..", "../a", "a..b", ".a", "", "a\n", "/a", "a\\b", "a\0", "a@1", "a b", "a" * 129]
)
def test_unit_id_that_is_no_file_name_is_refused(name, transfer_set):
    with pytest.raises(ValueError, match="pattern|128"):
        transfer_set.open(replace(UNITS[0], id=name))


def test_snapshot_has_the_wanted_units_that_are_committed_sorted(transfer_set, make_batch):
    for unit in reversed(UNITS):
        commit(transfer_set, unit, make_batch(2))
    assert transfer_set.snapshot().units == tuple(sorted(unit.id for unit in UNITS))
    assert transfer_set.snapshot(within=[UNITS[1].id, "never-made"]).units == (UNITS[1].id,)


def test_snapshot_survives_its_json_and_pickling(transfer_set, make_batch):
    for unit in UNITS:
        commit(transfer_set, unit, make_batch(5))
    snapshot = transfer_set.snapshot()
    assert Snapshot.from_json(snapshot.to_json()) == snapshot
    assert pickle.loads(pickle.dumps(transfer_set)).snapshot() == snapshot
    assert Snapshot.unpacked(snapshot.packed) == snapshot


def test_packed_snapshot_leaves_curves_out_and_is_small(transfer_set, make_batch):
    transfer_set.store.put("commits/r000-c0000-0000.json", OLD_RECORD)
    made = replace(commit(transfer_set, UNITS[1], make_batch(2)), unit="r000-c0001-0001")
    (old,) = transfer_set.snapshot(within=["r000-c0000-0000"]).commits
    assert old.curve
    assert Snapshot.unpacked(Snapshot((old, made)).packed).commits == (replace(old, curve=()), made)
    many = [replace(old, unit=f"r{number:05d}", curve=({"step": 1.0, "total": 0.1},) * 300) for number in range(2000)]
    assert len(Snapshot(tuple(many)).packed) < 2000 * 100


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", zlib.compress(b"{}"), zlib.compress(b"[1]")])
def test_what_is_no_packed_snapshot_is_refused(data):
    with pytest.raises(ValueError, match="not a packed snapshot|Input should be"):
        Snapshot.unpacked(data)


OLD_RECORD = (
    b'{"unit":"r000-c0000-0000","attempt":1,"seed":5,"images":2,"parts":[{"path":"parts/a-0000.parquet","rows":2,'
    b'"bytes":10,"xxh3":"00000000000000000000000000000000"}],"content":"00000000000000000000000000000000",'
    b'"objective":0.5,"student_version":-1,"seconds":1.5,"curve":[{"step":1.0,"total":3.0},{"step":50.0,"total":0.5}],'
    b'"generation":0}'
)


def test_record_of_an_earlier_version_with_a_curve_is_still_read(transfer_set):
    transfer_set.store.put("commits/r000-c0000-0000.json", OLD_RECORD)
    (made,) = transfer_set.snapshot().commits
    assert (made.unit, made.images, made.seconds) == ("r000-c0000-0000", 2, 1.5)
    assert made.curve == ({"step": 1.0, "total": 3.0}, {"step": 50.0, "total": 0.5})
    assert Snapshot.from_json(transfer_set.snapshot().to_json()).commits == (made,)


def test_new_record_has_no_curve(transfer_set, make_batch):
    assert commit(transfer_set, UNITS[0], make_batch(2)).curve == ()


def test_objective_that_diverged_survives_its_json(transfer_set, make_batch):
    made = commit(transfer_set, UNITS[0], make_batch(2, objective=math.nan))
    assert math.isnan(Commit.from_json(made.to_json()).objective)


def test_polling_reads_each_record_once(uri, make_batch, monkeypatch):
    writer, reader = TransferSet(uri, digest=DIGEST), TransferSet(uri, digest=DIGEST)
    fetched = []
    get = reader.store.get
    monkeypatch.setattr(reader.store, "get", lambda path, **limit: fetched.append(path) or get(path, **limit))
    for unit in UNITS:
        commit(writer, unit, make_batch(2))
        reader.snapshot()
    assert sorted(fetched) == sorted(f"commits/{unit.id}.json" for unit in UNITS)


def test_set_is_closed_until_it_is_reopened(transfer_set):
    assert not transfer_set.is_closed("plan")
    transfer_set.close("plan", ["r000-c0000-0000"])
    assert transfer_set.is_closed("plan")
    assert not transfer_set.is_closed("other"), "plans share a set, and one may end long before another"
    transfer_set.reopen("other")
    assert transfer_set.is_closed("plan")
    transfer_set.reopen("plan")
    transfer_set.reopen("plan")
    assert not transfer_set.is_closed("plan")
