from __future__ import annotations

import itertools
import threading
import weakref
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch

from raydfkd.data import set_source as sources
from raydfkd.data.batches import SyntheticBatch
from raydfkd.data.commits import Snapshot
from raydfkd.data.epochs import Epoch, EpochLog
from raydfkd.data.set_source import GrowingSource
from raydfkd.data.shards import StoredRows
from raydfkd.data.sources import SOURCES, Feed, Ranks
from raydfkd.data.transfer_set import TransferSet
from raydfkd.store.errors import StoreError
from raydfkd.store.store import Store
from raydfkd.units import Request, WorkUnit


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(sources, "POLL_S", 0.001)


EVERY_UNIT = frozenset(f"u{number:03d}" for number in range(100))
PLAN = "0123456789abcdef"


class Rows:
    """A transfer set whose rows are numbered: a row's label, its pixels and its first logit are its number."""

    def __init__(self, folder, *, part_rows=4096):
        self.set = TransferSet(str(folder / "set"), digest="d" * 64, part_rows=part_rows)
        self.set.create()
        self._number = itertools.count()
        self.units = []

    def write(self, *counts, commit=True):
        """Add a unit of as many rows for each of ``counts``; returns the numbers of all new rows."""
        written = []
        for count in counts:
            numbers = torch.tensor([next(self._number) for _ in range(count)])
            unit_id = f"u{len(self.units):03d}"
            request = Request(classes=(0,), images_per_class=count, seed=1, class_seeds=(1,))
            sink = self.set.open(WorkUnit(id=unit_id, request=request))
            logits = torch.zeros(count, 3).half()
            logits[:, 0] = numbers
            images = numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
            sink.write(SyntheticBatch(images=images, labels=numbers, teacher_logits=logits, objective=0.0))
            if commit:
                sink.commit(seconds=0.0)
            self.units.append(unit_id)
            written += numbers.tolist()
        return written

    def sources(
        self,
        ranks=1,
        *,
        steps=1000,
        batch_size=8,
        seed=3,
        planned=None,
        on_wait=None,
        epochs=None,
        kind="growing",
        units=EVERY_UNIT,
        image_bytes=4,
        feed=MappingProxyType({}),
        **spec,
    ):
        """One source a rank; rank 0 must be asked first in every step. It calls ``on_wait`` instead of waiting."""
        agreed = []

        def agree(snapshot):
            agreed.append(snapshot)
            if snapshot is None:
                assert on_wait is not None, "waits for images that nobody makes"
                on_wait()
            return snapshot

        return [
            SOURCES.build(
                kind,
                spec,
                Feed(
                    transfer_set=self.set,
                    units=units,
                    plan=PLAN,
                    image_bytes=image_bytes,
                    planned_images=planned or self.set.snapshot().images,
                    steps=steps,
                    batch_size=batch_size,
                    seed=seed,
                    ranks=Ranks(rank=rank, size=ranks, agree=agree if rank == 0 else follower(agreed)),
                    epochs=epochs,
                    **feed,
                ),
                where="test",
            )
            for rank in range(ranks)
        ]


def follower(agreed):
    """How a rank that is not asked learns what rank 0 said: once for each time that was asked."""
    number = itertools.count()
    return lambda _: agreed[next(number)]


def epochs(sources, count):
    """``count`` epochs of all ranks in step: for each pass, for each step, the ranks' batches."""
    streams = [iter(source) for source in sources]
    found = []
    while True:
        step = [next(stream) for stream in streams]
        positions = {(source.state_dict()["epoch"], source.state_dict()["step_in_epoch"]) for source in sources}
        assert len(positions) == 1, "all ranks stand at the same step of the same pass"
        number = positions.pop()[0]
        if number == count:
            return found
        if number == len(found):
            found.append([])
        found[number].append(step)


def numbers_of(steps):
    return [number for step in steps for batch in step for number in batch.labels.tolist()]


def taken(stream, count):
    return [batch.labels.tolist() for batch in itertools.islice(stream, count)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("window_rows", [1, 10, 65536])
def test_every_row_is_seen_exactly_once_in_a_pass(tmp_path, ranks, window_rows):
    rows = Rows(tmp_path, part_rows=7)
    written = rows.write(5, 16, 9, 23, 6, 4)
    for steps in epochs(rows.sources(ranks, window_rows=window_rows), 3):
        assert sorted(numbers_of(steps)) == written


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shares_of_the_ranks_average_to_one_and_weigh_every_image_alike(tmp_path, ranks):
    rows = Rows(tmp_path, part_rows=7)
    rows.write(5, 16, 9, 23)
    for steps in epochs(rows.sources(ranks), 2):
        for step in steps:
            assert sum(batch.share for batch in step) / ranks == pytest.approx(1)
            images = sum(len(batch.labels) for batch in step)
            for batch in step:
                assert batch.share == pytest.approx(len(batch.labels) * ranks / images)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("window_rows", [1, 12, 65536])
def test_every_step_is_a_whole_batch_to_rounding_and_every_rank_has_a_part_of_it(tmp_path, ranks, window_rows):
    """A window of a few rows, such as the last one of a pass, would make a step that is mostly noise."""
    rows = Rows(tmp_path, part_rows=5)
    rows.write(20, 30, 13, 1, 2)
    for steps in epochs(rows.sources(ranks, batch_size=8, window_rows=window_rows), 4):
        for step in steps:
            images = sum(len(batch.labels) for batch in step)
            assert 4 <= images <= 8, "at most a batch, and never less than half of one"
            assert min(len(batch.labels) for batch in step) >= images // ranks > 0


def test_columns_of_a_row_stay_together(tmp_path):
    rows = Rows(tmp_path, part_rows=7)
    rows.write(9, 16)
    for steps in epochs(rows.sources(), 1):
        for (batch,) in steps:
            assert batch.images.dtype == torch.uint8
            assert batch.images[:, 0, 0, 0].tolist() == batch.labels.tolist()
            assert batch.teacher_logits[:, 0].tolist() == batch.labels.tolist()


def test_passes_differ_in_their_order(tmp_path):
    rows = Rows(tmp_path)
    rows.write(20, 20)
    first, second = epochs(rows.sources(), 2)
    assert numbers_of(first) != numbers_of(second)


def test_order_mixes_rows_of_different_units(tmp_path):
    rows = Rows(tmp_path)
    rows.write(20, 20)
    (steps,) = epochs(rows.sources(batch_size=10), 1)
    for step in steps:
        units = {number // 20 for number in numbers_of([step])}
        assert units == {0, 1}


def test_order_follows_from_the_seed(tmp_path):
    rows = Rows(tmp_path)
    rows.write(20, 20)
    orders = [taken(iter(rows.sources(seed=seed)[0]), 10) for seed in (3, 3, 4)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_order_does_not_depend_on_which_unit_was_committed_first(tmp_path):
    rows = [Rows(tmp_path / name, part_rows=7) for name in ("one", "other")]
    for one in rows:
        one.write(9, 9, commit=False)
    orders = []
    for one, order in zip(rows, [(0, 1), (1, 0)], strict=True):
        for index in order:
            numbers = torch.arange(9) + 9 * index
            request = Request(classes=(0,), images_per_class=9, seed=1, class_seeds=(1,))
            sink = one.set.open(WorkUnit(id=one.units[index], request=request))
            images = torch.zeros(9, 1, 2, 2, dtype=torch.uint8)
            sink.write(
                SyntheticBatch(images=images, labels=numbers, teacher_logits=torch.zeros(9, 3).half(), objective=0.0)
            )
            sink.commit(seconds=0.0)
        orders.append(taken(iter(one.sources()[0]), 6))
    assert orders[0] == orders[1]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("at", [1, 3, 7, 8, 11])
def test_resumed_source_goes_on_with_the_same_batches(tmp_path, ranks, at):
    rows = Rows(tmp_path, part_rows=7)
    rows.write(5, 16, 9, 23, 11)
    one = rows.sources(ranks, window_rows=20)
    streams = [iter(source) for source in one]
    for _ in range(at):
        for stream in streams:
            next(stream)
    states = [source.state_dict() for source in one]
    expected = [taken(stream, 12) for stream in streams]
    other = rows.sources(ranks, window_rows=20)
    for source, state in zip(other, states, strict=True):
        source.load_state_dict(state)
    assert [taken(iter(source), 12) for source in other] == expected


def test_resumed_source_finishes_its_pass_on_the_snapshot_it_began_with(tmp_path):
    rows = Rows(tmp_path)
    written = rows.write(16, 16)
    (source,) = rows.sources(kind="growing", wait_for=1, planned=64)
    before = taken(iter(source), 1)
    state = source.state_dict()
    rows.write(16)
    (resumed,) = rows.sources(kind="growing", wait_for=1, planned=64)
    resumed.load_state_dict(state)
    stream = iter(resumed)
    rest = [next(stream) for _ in range(3)]
    assert sorted(sum(before, []) + [number for batch in rest for number in batch.labels.tolist()]) == written
    assert {batch.snapshot_images for batch in rest} == {32}
    assert next(stream).snapshot_images == 48


def test_state_is_plain_data(tmp_path):
    rows = Rows(tmp_path)
    rows.write(16)
    (source,) = rows.sources()
    next(iter(source))
    assert {type(value) for value in source.state_dict().values()} == {int, str}


def test_iterating_again_goes_on_where_the_source_stands(tmp_path):
    rows = Rows(tmp_path)
    rows.write(16, 16)
    expected = taken(iter(rows.sources()[0]), 6)
    (source,) = rows.sources()
    assert taken(iter(source), 3) + taken(iter(source), 3) == expected


def test_growing_source_waits_until_there_are_the_images_it_wants_first(tmp_path):
    rows = Rows(tmp_path)
    rows.write(4)
    polls = []

    def commit_another():
        polls.append(rows.set.snapshot().images)
        rows.write(4)

    (source,) = rows.sources(kind="growing", wait_for=11, planned=100, on_wait=commit_another)
    assert next(iter(source)).snapshot_images == 12
    assert polls == [4, 8]


def test_growing_source_starts_as_soon_as_there_is_enough_and_takes_the_newest_set_for_each_pass(tmp_path):
    rows = Rows(tmp_path)
    rows.write(8)
    (source,) = rows.sources(kind="growing", wait_for=1, planned=1000, steps=1000, batch_size=8)
    stream, seen = iter(source), []
    for _ in range(3):
        seen.append(next(stream).snapshot_images)
        rows.write(8)
    assert seen[0] == 8
    assert seen[1] == 16
    assert seen == sorted(seen)


@pytest.mark.parametrize("complete_by", [0.0, 0.5, 1.0])
def test_student_keeps_pace_with_a_synthesis_that_is_slower(tmp_path, complete_by):
    planned, steps = 80, 40
    rows = Rows(tmp_path)
    rows.write(4)
    (source,) = rows.sources(
        kind="growing",
        wait_for=4,
        planned=planned,
        steps=steps,
        batch_size=4,
        complete_by=complete_by,
        on_wait=lambda: rows.write(4),
    )
    stream = iter(source)
    begun = 0
    for step in range(steps):
        batch = next(stream)
        if source.state_dict()["step_in_epoch"] == 1:
            begun = step
        share = min(1.0, begun / (complete_by * steps)) if complete_by else 1.0
        wanted = min(planned, max(4, int(share * planned)))
        assert wanted <= batch.snapshot_images <= wanted + 4, "enough images, and no longer waited than for them"


def test_closed_set_is_good_enough_however_small(tmp_path):
    rows = Rows(tmp_path)
    rows.write(4)
    rows.set.close(PLAN, ["u001"])
    for spec in ({"kind": "growing", "wait_for": 50}, {"kind": "snapshot"}):
        (source,) = rows.sources(planned=100, **spec)
        assert next(iter(source)).snapshot_images == 4


def test_closed_set_without_an_image_ends_the_iteration(tmp_path):
    rows = Rows(tmp_path)
    rows.set.close(PLAN, ["u000"])
    (source,) = rows.sources(planned=100)
    assert list(source) == []


@pytest.mark.parametrize("spec", [{"kind": "growing", "wait_for": 8}, {"kind": "snapshot"}])
def test_set_that_is_closed_for_a_shorter_plan_is_waited_for(tmp_path, spec):
    """Plans of different length share a set, and the shorter one ends first."""
    rows = Rows(tmp_path)
    rows.write(4)
    rows.set.close("f" * 16)
    (source,) = rows.sources(planned=8, on_wait=lambda: rows.write(4), **spec)
    assert next(iter(source)).snapshot_images == 8


def test_snapshot_source_waits_for_the_whole_plan(tmp_path):
    rows = Rows(tmp_path)
    rows.write(4)
    (source,) = rows.sources(kind="snapshot", planned=12, on_wait=lambda: rows.write(4))
    assert next(iter(source)).snapshot_images == 12


def test_rows_that_are_not_committed_are_never_seen(tmp_path):
    rows = Rows(tmp_path, part_rows=2)
    committed = rows.write(8)
    rows.write(8, commit=False)
    committed += rows.write(8)
    for steps in epochs(rows.sources(), 3):
        assert sorted(numbers_of(steps)) == committed


def test_units_outside_the_plan_are_never_seen(tmp_path):
    rows = Rows(tmp_path)
    planned = rows.write(8)
    (source,) = rows.sources(units=["u000"])
    rows.write(8)
    for steps in epochs([source], 3):
        assert sorted(numbers_of(steps)) == planned


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_rank_reads_only_the_parts_that_hold_its_rows(tmp_path, ranks, monkeypatch):
    rows = Rows(tmp_path, part_rows=4)
    rows.write(48)
    reads = []
    read = TransferSet.read
    monkeypatch.setattr(TransferSet, "read", lambda self, part: reads.append(part.path) or read(self, part))
    for source in rows.sources(ranks):
        reads.clear()
        next(iter(source))
        assert len(reads) == len(set(reads)) == 12 // ranks


def test_source_holds_no_more_than_the_window_in_use_and_the_next_one(tmp_path, monkeypatch):
    rows = Rows(tmp_path, part_rows=4)
    written = rows.write(40)
    parts = weakref.WeakSet()

    def read(self, part, read=TransferSet.read):
        kept = Kept(**{name: getattr(read(self, part), name) for name in ("images", "labels", "teacher_logits")})
        parts.add(kept)
        return kept

    monkeypatch.setattr(TransferSet, "read", read)
    (source,) = rows.sources(window_rows=8, batch_size=4)
    seen = []
    for batch in itertools.islice(source, 10):
        seen += batch.labels.tolist()
        assert sum(map(len, list(parts))) <= 3 * 8, "two windows, and one that is just being dropped"
    assert sorted(seen) == written


class Kept(StoredRows):
    """Rows that can be watched, unlike those with slots."""

    __slots__ = ("__weakref__",)
    __hash__ = object.__hash__


def test_set_that_fits_into_a_window_is_read_once(tmp_path, monkeypatch):
    rows = Rows(tmp_path, part_rows=4)
    rows.write(40)
    reads = []
    read = TransferSet.read
    monkeypatch.setattr(TransferSet, "read", lambda self, part: reads.append(part.path) or read(self, part))
    epochs(rows.sources(batch_size=4), 3)
    assert len(reads) == len(set(reads)) == 10


def damage(rows, units):
    """Damage every part of these units; returns the numbers of all other rows."""
    left = []
    for commit in rows.set.snapshot().commits:
        for part in commit.parts:
            if commit.unit in units:
                rows.set.store.put(part.path, b"damaged")
            else:
                left += rows.set.read(part).labels.tolist()
    return sorted(left)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("window_rows", [8, 24, 65536])
@pytest.mark.parametrize("num_damaged", [1, 7, 9])
def test_units_that_cannot_be_read_are_taken_out_while_all_ranks_make_their_steps(
    tmp_path, ranks, window_rows, num_damaged, caplog
):
    """A rank that finds damage says nothing to the others, whose collectives must go on matching its own."""
    caplog.set_level("INFO")
    rows = Rows(tmp_path, part_rows=8)
    rows.write(*[8] * 10)
    rows.set.close(PLAN)
    sources = rows.sources(ranks, window_rows=window_rows)
    broken = {f"u{number:03d}" for number in range(num_damaged)}
    left = damage(rows, broken)
    first, second, third = epochs(sources, 3)
    assert len(first) == 10, "as many steps as without damage"
    for step in first:
        assert sum(len(batch.labels) for batch in step) == 8
        assert sum(batch.share for batch in step) / ranks == pytest.approx(1)
    assert set(numbers_of(first)) == set(left), "every image that can be read, some of them again"
    assert rows.set.damaged() == broken
    assert {unit for unit in rows.units if unit in caplog.text} == broken
    for steps in (second, third):
        assert sorted(numbers_of(steps)) == left


def test_columns_of_rows_that_stand_in_for_damaged_ones_stay_together(tmp_path):
    rows = Rows(tmp_path, part_rows=4)
    rows.write(*[8] * 4)
    sources = rows.sources()
    damage(rows, {"u001"})
    for step in epochs(sources, 1)[0]:
        for batch in step:
            assert batch.images[:, 0, 0, 0].tolist() == batch.labels.tolist()
            assert batch.teacher_logits[:, 0].tolist() == batch.labels.tolist()


def test_source_none_of_whose_images_can_be_read_ends_in_one_line(tmp_path):
    rows = Rows(tmp_path)
    rows.write(8, 8)
    rows.set.close(PLAN)
    (source,) = rows.sources()
    damage(rows, {"u000", "u001"})
    with pytest.raises(StoreError, match="none of the 16 images that an epoch began with can be read any more"):
        next(iter(source))
    assert rows.set.damaged() == {"u000", "u001"}
    assert list(rows.sources(planned=16)[0]) == [], "who tries again finds a set without an image"


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_that_resumes_in_an_epoch_whose_images_were_taken_out_begins_another(tmp_path, ranks):
    rows = Rows(tmp_path, part_rows=8)
    rows.write(8, 8, 8)
    rows.set.close(PLAN)
    before = rows.sources(ranks, window_rows=8)
    streams = [iter(source) for source in before]
    for stream in streams:
        next(stream)
    states = [source.state_dict() for source in before]
    for stream in streams:
        stream.close()
    (part,) = rows.set.commit_of("u001").parts
    content = rows.set.store.get(part.path)
    left = damage(rows, {"u001"})
    list(rows.set.verify())
    rows.set.store.put(part.path, content)  # whatever is there now, nobody reads it
    restored = rows.sources(ranks, window_rows=8, on_wait=lambda: None)
    for source, state in zip(restored, states, strict=True):
        source.load_state_dict(state)
    streams = [iter(source) for source in restored]
    seen = numbers_of([[next(stream) for stream in streams] for _ in range(2)])
    assert sorted(seen) == left


def test_snapshot_of_an_earlier_version_in_a_checkpoint_is_not_read_and_another_epoch_begins(tmp_path):
    rows = Rows(tmp_path)
    written = rows.write(8, 8)
    (source,) = rows.sources()
    state = {"step": 5, "epoch": 2, "step_in_epoch": 1, "snapshot": rows.set.snapshot().to_json().decode()}
    source.load_state_dict(state)
    stream = iter(source)
    assert sorted(sum(taken(stream, 2), [])) == written
    assert (source.state_dict()["step"], source.state_dict()["epoch"]) == (7, 3)


def test_pass_ends_early_for_a_newer_snapshot_and_only_for_one(tmp_path):
    rows = Rows(tmp_path)
    rows.write(40)
    (source,) = rows.sources(wait_for=1, planned=1000, refresh_steps=2, on_wait=lambda: None)
    stream, sizes = iter(source), []
    for step in range(12):
        if step == 3:
            rows.write(40)
        sizes.append(next(stream).snapshot_images)
    assert sizes == [40] * 4 + [80] * 8, "the next look after step 3 is that after step 4"
    assert source.state_dict()["epoch"] == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_pass_that_nothing_ends_early_sees_every_row_once(tmp_path, ranks):
    rows = Rows(tmp_path, part_rows=7)
    written = rows.write(5, 16, 9, 23)
    for steps in epochs(rows.sources(ranks, refresh_steps=2, planned=1000, wait_for=1, on_wait=lambda: None), 3):
        assert sorted(numbers_of(steps)) == written


def test_refresh_never_waits_for_images(tmp_path):
    """A student that may not have the next pass yet goes on with this one."""
    rows = Rows(tmp_path)
    rows.write(40)
    (source,) = rows.sources(wait_for=1, complete_by=1.0, planned=200, steps=10, refresh_steps=1, on_wait=lambda: None)
    stream = iter(source)
    for step in range(5):
        if step == 3:
            rows.write(1)  # of the 60 wanted by then
        next(stream)
    assert source.state_dict()["epoch"] == 0


def test_old_and_new_images_are_equally_likely_to_be_next_after_a_refresh(tmp_path):
    rows = Rows(tmp_path, part_rows=4)
    old = set(rows.write(48))
    states = []
    for seed in range(40):
        (source,) = rows.sources(seed=seed, wait_for=1, planned=1000, refresh_steps=3)
        taken(iter(source), 3)
        states.append(source.state_dict())
    new = set(rows.write(48))
    views = {number: 0 for number in old | new}
    for seed, state in enumerate(states):
        (source,) = rows.sources(seed=seed, wait_for=1, planned=1000, refresh_steps=3)
        source.load_state_dict(state)
        for number in sum(taken(iter(source), 3), []):
            views[number] += 1
    drawn = sum(views.values())
    assert drawn == 40 * 24
    # parts of 4 rows are drawn together, so the share's standard deviation is about 3 %
    assert sum(views[number] for number in new) / drawn == pytest.approx(1 / 2, abs=0.1)
    assert min(views.values()) > 0, "none is left out"


def grown(rows, sources, script, first, last):
    """Numbers of each step's rows, rank by rank; before step s ``script[s]`` rows are committed, once."""
    streams = [iter(source) for source in sources]
    steps = {}
    for step in range(first, last):
        if count := script.pop(step, None):
            rows.write(count)
        steps[step] = [next(stream).labels.tolist() for stream in streams]
    return steps, streams


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("refresh_steps", [None, 3])
@pytest.mark.parametrize(("saved", "killed"), [(2, 9), (6, 23), (0, 17)])
def test_training_that_is_killed_while_the_set_grows_repeats_its_batches(tmp_path, ranks, refresh_steps, saved, killed):
    """What it went over between checkpoint and kill was chosen from a set that is larger by now."""
    script = {3: 16, 4: 8, 8: 24, 13: 8, 14: 8, 21: 30, 24: 10}
    spec = {"wait_for": 1, "planned": 24 + sum(script.values()), "refresh_steps": refresh_steps, "window_rows": 40}
    spec["on_wait"] = lambda: None
    undisturbed = Rows(tmp_path / "one", part_rows=7)
    undisturbed.write(24)
    expected, _ = grown(undisturbed, undisturbed.sources(ranks, **spec), dict(script), 0, 30)

    rows = Rows(tmp_path / "other", part_rows=7)
    rows.write(24)
    left = dict(script)
    log = EpochLog(Store(str(tmp_path / "run")), "t" * 64)
    before = rows.sources(ranks, epochs=log, **spec)
    _, streams = grown(rows, before, left, 0, saved)
    states = [source.state_dict() for source in before]
    for stream in streams:
        stream.close()
    _, streams = grown(rows, before, left, saved, killed)
    for stream in streams:
        stream.close()

    resumed = rows.sources(ranks, epochs=EpochLog(Store(str(tmp_path / "run")), "t" * 64), **spec)
    for source, state in zip(resumed, states, strict=True):
        source.load_state_dict(state)
    found, _ = grown(rows, resumed, left, saved, 30)
    assert found == {step: expected[step] for step in range(saved, 30)}


@pytest.mark.parametrize("content", [b"", b"{", b'{"first_step": "x"}'])
def test_damaged_record_of_an_epoch_costs_its_choice_and_no_training(tmp_path, content, caplog):
    store = Store(str(tmp_path / "run"))
    log = EpochLog(store, "t" * 64)
    for number in (0, 1):
        log.write(number, Epoch(first_step=3 * number, plan=PLAN, units="gA=="))
        log.keep(number, log.read(number), until=5)
    first, kept, *_ = store.list("epochs-" + 16 * "t")
    whole = log.read(0)
    for path in (first, kept):
        store.put(path, content)
    assert log.read(0) is None
    assert log.kept_until(0, whole) == 0
    assert log.read(1) is not None
    assert log.kept_until(1, log.read(1)) == 5
    assert f"{first} is not the record of an epoch" in caplog.text
    log.forget()
    assert log.read(1) is None


def test_batch_tells_how_many_images_the_recipe_wants_it_to_be_drawn_from(tmp_path):
    """More than there are only where synthesis has ended without the others."""
    rows = Rows(tmp_path)
    rows.write(8)
    (source,) = rows.sources(
        planned=24, steps=10, batch_size=8, wait_for=4, complete_by=0.5, on_wait=lambda: rows.set.close(PLAN)
    )
    stream = iter(source)
    batches = list(itertools.islice(stream, 7))
    stream.close()
    assert [batch.snapshot_images for batch in batches] == [8] * 7
    assert [batch.wanted_images for batch in batches] == [4, 4, 24, 24, 24, 24, 24]


def test_batch_of_an_epoch_that_is_resumed_wants_as_many_images_as_before(tmp_path):
    """The set that it began with was growing; that it has grown and is closed now makes no epoch incomplete."""
    rows = Rows(tmp_path)
    rows.write(24)
    spec = {"planned": 32, "steps": 10, "batch_size": 8, "wait_for": 4}
    (source,) = rows.sources(**spec)
    stream = iter(source)
    next(stream)
    state = source.state_dict()
    stream.close()
    rows.write(8)
    rows.set.close(PLAN)
    (resumed,) = rows.sources(**spec)
    resumed.load_state_dict(state)
    stream = iter(resumed)
    batches = [next(stream) for _ in range(3)]
    stream.close()
    assert [(batch.snapshot_images, batch.wanted_images) for batch in batches] == [(24, 4), (24, 4), (32, 32)]


GROWS = {"wait_for": 1, "planned": 1000, "refresh_steps": 2, "on_wait": lambda: None}


def epoch_log(folder):
    return EpochLog(Store(str(folder / "run")), "t" * 64)


def test_decision_to_keep_a_snapshot_is_repeated_after_a_kill(tmp_path):
    rows = Rows(tmp_path)
    rows.write(80)
    (killed,) = rows.sources(epochs=epoch_log(tmp_path), **GROWS)
    stream = iter(killed)
    taken(stream, 1)
    state = killed.state_dict()
    expected = taken(stream, 4)
    stream.close()
    rows.write(40)
    (resumed,) = rows.sources(epochs=epoch_log(tmp_path), **GROWS)
    resumed.load_state_dict(state)
    stream = iter(resumed)
    assert taken(stream, 4) == expected, "looks after steps 2 and 4 found nothing then"
    assert [next(stream).snapshot_images for _ in range(2)] == [80, 120], "that after step 6 was never made"


def test_decision_to_keep_another_epoch_of_that_number_is_none(tmp_path):
    rows = Rows(tmp_path)
    rows.write(80)
    log = epoch_log(tmp_path)
    log.keep(0, Epoch(first_step=7, plan="", units=""), until=1000)
    (source,) = rows.sources(epochs=log, **GROWS)
    stream = iter(source)
    taken(stream, 1)
    rows.write(40)
    assert [next(stream).snapshot_images for _ in range(2)] == [80, 120]


def test_epoch_of_another_plan_is_not_gone_on_with(tmp_path):
    rows = Rows(tmp_path)
    rows.write(8)
    log = epoch_log(tmp_path)
    taken(iter(rows.sources(epochs=log, units=["u000", "u001"], **GROWS)[0]), 1)
    rows.write(8)
    for units, images in ((["u000", "u001"], 8), (["u000", "u001", "u002"], 16)):
        (source,) = rows.sources(epochs=log, units=units, **GROWS)
        assert next(iter(source)).snapshot_images == images


def test_log_of_epochs_is_small_and_is_written_where_something_is_decided(tmp_path, monkeypatch):
    rows, put = Rows(tmp_path), Store.put
    rows.write(40)
    written = []
    monkeypatch.setattr(
        Store, "put", lambda self, path, data, **how: written.append((path, len(data))) or put(self, path, data, **how)
    )
    log = epoch_log(tmp_path)
    units = frozenset(f"u{number:05d}" for number in range(20_000)) | EVERY_UNIT
    (source,) = rows.sources(
        wait_for=1, planned=1000, refresh_steps=2, epochs=log, units=units, batch_size=4, on_wait=lambda: None
    )
    stream = iter(source)
    taken(stream, 10)
    taken(stream, 3)
    begun, kept = "epochs-tttttttttttttttt/000000.begun.json", "epochs-tttttttttttttttt/000000.kept.json"
    assert [path for path, _ in written] == [
        begun,
        *[kept] * 5,
        begun.replace("00.b", "01.b"),
        kept.replace("00.k", "01.k"),
    ]
    sizes = dict(written)
    assert sizes[begun] < 4096, "20,100 units"
    assert sizes[kept] < 64


def test_epoch_over_as_large_a_set_as_any_is_planned_in_linear_time(tmp_path):
    rows = Rows(tmp_path)
    rows.write(4)
    (made,) = rows.set.snapshot().commits
    (source,) = rows.sources()
    (part,) = made.parts

    class Counted(int):
        """A number of rows that is looked at a number of times."""

        looks = 0

        def __radd__(self, other):
            Counted.looks += 1
            return int(self) + other

        __add__ = __radd__

    commits = tuple(
        replace(made, unit=f"u{number:05d}", parts=(replace(part, path=f"parts/{number}", rows=Counted(10)),))
        for number in range(5000)
    )
    shares = source.plan(Snapshot(commits))
    assert sum(share.split.total for share in shares) == 50_000
    assert Counted.looks <= 5 * 5000


@pytest.mark.parametrize(
    ("image_bytes", "classes", "buffer_rows"),
    [
        (3 * 32 * 32, 10, 65536),
        (3 * 64 * 64, 1000, 65536),
        (3 * 224 * 224, 1000, 7133),
        (2**24, 10, 64),
        (3 * 32 * 32, 8192, 65536),
        (3 * 32 * 32, 21_841, 2**29 // 21_841),
    ],
)
def test_shuffle_buffer_of_large_images_or_of_very_many_classes_has_fewer_rows(
    tmp_path, image_bytes, classes, buffer_rows
):
    rows = Rows(tmp_path)
    rows.write(4)
    (made,) = rows.set.snapshot().commits
    (part,) = made.parts
    parts = (replace(part, rows=1),) * 70_000
    (source,) = rows.sources(image_bytes=image_bytes, feed={"num_classes": classes})
    shares = source.plan(Snapshot((replace(made, images=70_000, parts=parts),)))
    assert shares[0].split.total == buffer_rows


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_buffer_is_split_into_full_steps_whose_ranks_differ_by_one_image(ranks):
    for total in range(ranks, 60):
        for steps in range(1, total // ranks + 1):
            split = sources.Split(total=total, steps=steps, ranks=ranks)
            sizes = [
                [split.taken(step + 1, rank) - split.taken(step, rank) for rank in range(ranks)]
                for step in range(steps)
            ]
            assert [sum(step) for step in sizes] == [split.size(step) for step in range(steps)]
            assert {split.size(step) for step in range(steps)} <= {total // steps, -(-total // steps)}
            assert all(max(step) - min(step) <= 1 <= max(step) and min(step) >= 1 for step in sizes)
            shares = [split.first_row(rank + 1) - split.first_row(rank) for rank in range(ranks)]
            assert sum(shares) == total
            assert max(shares) - min(shares) <= 1


def test_ranks_agree_in_the_thread_that_trains(tmp_path):
    """What they agree by is a collective, and those of the gradients come from this thread as well."""
    rows = Rows(tmp_path)
    rows.write(16)
    threads = set()
    ranks = Ranks(agree=lambda snapshot: threads.add(threading.current_thread()) or snapshot)
    source = GrowingSource(
        Feed(
            transfer_set=rows.set,
            units=EVERY_UNIT,
            plan=PLAN,
            image_bytes=4,
            planned_images=16,
            steps=10,
            batch_size=8,
            seed=0,
            ranks=ranks,
        )
    )
    taken(source, 5)
    assert threads == {threading.current_thread()}


def test_threads_end_when_the_student_has_enough(tmp_path):
    rows = Rows(tmp_path, part_rows=4)
    rows.write(64)
    before = threading.active_count()
    stream = iter(rows.sources(window_rows=8)[0])
    next(stream)
    assert threading.active_count() > before
    stream.close()
    assert threading.active_count() == before
