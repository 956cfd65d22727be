from __future__ import annotations

import itertools
import threading
from collections import Counter

import pytest
import torch
from test_sources import EVERY_UNIT, PLAN, Rows, follower
from toy import toy_recipe

from raydfkd.checkpoints import checkpoint_bytes, read_checkpoint
from raydfkd.data import set_source
from raydfkd.data.batches import SyntheticBatch
from raydfkd.data.sources import SOURCES, Feed, Ranks
from raydfkd.errors import RecipeError
from raydfkd.runner.check import check
from raydfkd.store.errors import StoreError
from raydfkd.units import Request, WorkUnit


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(set_source, "POLL_S", 0.001)


def source_of(rows, **spec):
    (source,) = rows.sources(kind="priority", **spec)
    return source


def draw(source, steps, loss=lambda numbers: torch.ones(len(numbers)), stream=None):
    """The batches of so many steps, each followed by the ``loss`` of its rows."""
    found = []
    for batch in itertools.islice(iter(source) if stream is None else stream, steps):
        found.append(batch)
        source.note(loss(batch.labels))
    return found


def by_number(numbers):
    """A loss that differs from row to row."""
    return (numbers.float() % 7) / 3 + 0.1


def numbers_of(batches):
    return torch.cat([batch.labels for batch in batches])


def with_classes(folder, classes):
    """A set whose rows' labels are their numbers and whose teacher answers the ``classes``."""
    rows = Rows(folder)
    logits = 5 * torch.nn.functional.one_hot(torch.tensor(classes)).half()
    request = Request(classes=(0,), images_per_class=len(classes), seed=1, class_seeds=(1,))
    sink = rows.set.open(WorkUnit(id="u000", request=request))
    numbers = torch.arange(len(classes))
    images = numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    sink.write(SyntheticBatch(images=images, labels=numbers, teacher_logits=logits, objective=0.0))
    sink.commit(seconds=0.0)
    return rows


def test_rows_are_drawn_by_their_difficulty_to_the_power_of_alpha(tmp_path):
    rows = Rows(tmp_path, part_rows=3)
    rows.write(8)
    source = source_of(rows, alpha=0.5, batch_size=100)

    def loss(numbers):
        return (numbers.float() + 1) ** 2

    draw(source, 3, loss)
    found = numbers_of(draw(source, 200, loss)).bincount()
    expected = torch.arange(1.0, 9)
    torch.testing.assert_close(found / found.sum(), expected / expected.sum(), atol=0.01, rtol=0)


def test_weighted_draws_have_the_mean_of_uniform_ones(tmp_path):
    rows = Rows(tmp_path)
    rows.write(8)
    source = source_of(rows, alpha=1.0, beta=1.0, batch_size=100)
    draw(source, 3, lambda numbers: numbers.float() + 1)
    batches = draw(source, 300, lambda numbers: numbers.float() + 1)
    values = torch.tensor([3.0, 1, 4, 1, 5, 9, 2, 6])
    mean = torch.stack([(batch.weights * values[batch.labels]).mean() for batch in batches]).mean()
    assert float(mean) == pytest.approx(float(values.mean()), rel=0.02)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_weights_are_those_of_prioritised_replay_and_one_on_average(tmp_path, beta):
    rows = Rows(tmp_path)
    rows.write(5)
    source = source_of(rows, alpha=1.0, beta=beta, batch_size=200)
    draw(source, 2, lambda numbers: numbers.float() + 1)
    (batch,) = draw(source, 1)
    odds = torch.arange(1.0, 6) / 15
    expected = (5 * odds) ** -beta
    expected /= (odds * expected).sum()
    torch.testing.assert_close(batch.weights, expected[batch.labels])


def test_without_priority_every_row_weighs_one_and_comes_alike(tmp_path):
    rows = Rows(tmp_path)
    rows.write(6)
    batches = draw(source_of(rows, alpha=0.0, batch_size=60), 100, lambda numbers: numbers.float())
    assert all(torch.equal(batch.weights, torch.ones(60)) for batch in batches)
    found = numbers_of(batches).bincount()
    torch.testing.assert_close(found / found.sum(), torch.full((6,), 1 / 6), atol=0.02, rtol=0)


def test_rare_class_is_drawn_oftener_than_its_share(tmp_path):
    rows = with_classes(tmp_path, [0] * 18 + [1] * 2)
    batches = draw(source_of(rows, alpha=1.0, batch_size=50), 100)
    rare = (numbers_of(batches) >= 18).float().mean()
    assert 0.13 < rare < 0.3
    plain = numbers_of(draw(source_of(rows, alpha=0.0, batch_size=50), 100))
    assert float((plain >= 18).float().mean()) == pytest.approx(0.1, abs=0.02)


def test_row_that_was_never_drawn_is_as_likely_as_the_most_difficult_one(tmp_path):
    rows = Rows(tmp_path)
    written = rows.write(200)
    source = source_of(rows, alpha=1.0, batch_size=20)
    first = draw(source, 1, lambda numbers: torch.where(numbers == numbers[0], 1.0, 1e-6))
    hardest = int(first[0].labels[0])
    others = numbers_of(draw(source, 9, lambda numbers: torch.where(numbers == hardest, 1.0, 1e-6)))
    assert len(set(others.tolist()) & set(first[0].labels.tolist())) == 1, "what is learnt rests"
    seen = draw(source, 40, lambda numbers: torch.where(numbers == hardest, 1.0, 1e-6))
    assert set(numbers_of([*first, *seen]).tolist()) | set(others.tolist()) >= set(written)


def test_row_that_comes_twice_in_a_batch_has_the_mean_of_its_losses(tmp_path):
    rows = Rows(tmp_path)
    rows.write(1)
    source = source_of(rows, batch_size=4)
    next(iter(source))
    source.note(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    (difficulty,) = source.state_dict()["difficulty"].values()
    assert difficulty.tolist() == [3.0]


def test_loss_that_is_not_finite_is_left_to_the_trainer(tmp_path):
    rows = Rows(tmp_path)
    rows.write(4)
    source = source_of(rows)
    assert len(draw(source, 3, lambda numbers: torch.full((len(numbers),), float("nan")))) == 3


@pytest.mark.parametrize("at", [1, 4, 9])
def test_resumed_source_draws_the_same_batches(tmp_path, at):
    rows = Rows(tmp_path, part_rows=7)
    rows.write(5, 16, 9)
    one = source_of(rows)
    stream = iter(one)
    draw(one, at, by_number, stream)
    state = read_checkpoint(checkpoint_bytes(one.state_dict()))
    expected = draw(one, 6, by_number, stream)
    other = source_of(rows)
    other.load_state_dict(state)
    assert checkpoint_bytes(other.state_dict()) == checkpoint_bytes(state), "also before it has drawn"
    for mine, its in zip(draw(other, 6, by_number), expected, strict=True):
        assert torch.equal(mine.labels, its.labels)
        assert torch.equal(mine.weights, its.weights)


class Together:
    """Two ranks in two threads, which agree and gather as processes do."""

    def __init__(self, rows, **spec):
        self._barrier, self._box = threading.Barrier(2), [None, None]
        agreed = []

        def first(snapshot):
            agreed.append(snapshot)
            return snapshot

        agrees = (first, follower(agreed))
        self.sources = []
        for rank in range(2):
            feed = Feed(
                transfer_set=rows.set,
                units=EVERY_UNIT,
                plan=PLAN,
                image_bytes=4,
                planned_images=rows.set.snapshot().images,
                steps=1000,
                batch_size=9,
                seed=3,
                ranks=Ranks(rank=rank, size=2, agree=agrees[rank], gather=self._gatherer(rank)),
            )
            self.sources.append(SOURCES.build("priority", spec, feed, where="test"))
        self._streams = [iter(source) for source in self.sources]

    def _gatherer(self, rank):
        def gather(rows):
            self._box[rank] = rows
            self._barrier.wait()
            joined = torch.cat(self._box)
            self._barrier.wait()
            return joined

        return gather

    def draw(self, steps, loss):
        found = []
        for _ in range(steps):
            batches = [next(stream) for stream in self._streams]
            notes = [
                threading.Thread(target=source.note, args=(loss(batch.labels),))
                for source, batch in zip(self.sources, batches, strict=True)
            ]
            for thread in notes:
                thread.start()
            for thread in notes:
                thread.join()
            found.append(batches)
        return found


def test_ranks_draw_from_shares_of_their_own_and_know_of_all_difficulties(tmp_path):
    rows = Rows(tmp_path, part_rows=7)
    written = rows.write(5, 16, 9, 1)
    together = Together(rows)
    steps = together.draw(60, by_number)
    shares = [set(numbers_of([step[rank] for step in steps]).tolist()) for rank in range(2)]
    assert shares[0] | shares[1] == set(written)
    assert not shares[0] & shares[1]
    assert abs(len(shares[0]) - len(shares[1])) <= len(written) // 4
    for step in steps:
        assert sum(len(batch.labels) for batch in step) == 9
        assert sum(batch.share for batch in step) / 2 == pytest.approx(1)
    one, other = (checkpoint_bytes(source.state_dict()) for source in together.sources)
    assert one == other


def test_ranks_resume_from_the_state_of_the_first(tmp_path):
    rows = Rows(tmp_path, part_rows=7)
    rows.write(5, 16, 9)
    together, again = Together(rows), Together(rows)
    together.draw(5, by_number)
    state = together.sources[0].state_dict()
    for source in again.sources:
        source.load_state_dict(state)
    for mine, its in zip(again.draw(5, by_number), together.draw(5, by_number), strict=True):
        assert [batch.labels.tolist() for batch in mine] == [batch.labels.tolist() for batch in its]


def test_newest_snapshot_is_taken_and_what_was_known_stays_known(tmp_path):
    rows = Rows(tmp_path)
    rows.write(8)
    source = source_of(rows, planned=16, refresh_steps=3, steps=10**6, wait_for=8)
    stream = iter(source)
    draw(source, 2, by_number, stream)
    before = source.state_dict()["difficulty"]
    rows.write(8)
    batches = draw(source, 2, by_number, stream)
    assert [batch.snapshot_images for batch in batches] == [8, 16]
    after = source.state_dict()["difficulty"]
    ((path, difficulty),) = before.items()
    was_drawn = difficulty >= 0
    assert torch.equal(after[path][was_drawn], difficulty[was_drawn])
    assert len(after) == 2


def test_student_that_is_ahead_of_the_synthesis_waits(tmp_path):
    rows = Rows(tmp_path)
    rows.write(8)
    source = source_of(
        rows, planned=16, refresh_steps=2, steps=8, complete_by=0.5, on_wait=lambda: rows.write(4), batch_size=4
    )
    found = [batch.snapshot_images for batch in draw(source, 8)]
    assert found == [8, 8, 8, 8, 16, 16, 16, 16]


def test_unit_that_is_damaged_is_left_out(tmp_path):
    rows = Rows(tmp_path)
    rows.write(8)
    damaged = rows.write(8)
    path = sorted(part.path for commit in rows.set.snapshot().commits for part in commit.parts)[1]
    rows.set.store.put(path, rows.set.store.get(path)[:-1] + b"?")
    found = numbers_of(draw(source_of(rows), 30))
    assert not set(found.tolist()) & set(damaged)
    assert rows.set.snapshot().images == 8


def test_set_of_which_nothing_can_be_read_is_an_error(tmp_path):
    rows = Rows(tmp_path)
    rows.write(8)
    (path,) = (part.path for commit in rows.set.snapshot().commits for part in commit.parts)
    rows.set.store.put(path, b"?" * len(rows.set.store.get(path)))
    with pytest.raises(StoreError, match="none of the 8 images"):
        next(iter(source_of(rows)))


def test_every_row_of_a_batch_is_whole(tmp_path):
    rows = Rows(tmp_path, part_rows=3)
    rows.write(9, 5)
    for batch in draw(source_of(rows), 10):
        assert batch.images[:, 0, 0, 0].tolist() == batch.labels.tolist() == batch.teacher_logits[:, 0].tolist()
        assert max(Counter(batch.labels.tolist()).values()) <= 8


def test_set_that_does_not_fit_into_memory_is_refused_before_any_work(tmp_path):
    recipe = toy_recipe(tmp_path, ["distill.source=priority", "transfer_set.images_per_class=30000000"])
    with pytest.raises(RecipeError, match="is priority, .* 120,000,000 images are 7 GiB and 4 are held"):
        check(recipe)
