from __future__ import annotations

import hashlib
import pickle
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from raydfkd.seeds import derive_seed
from raydfkd.units import MAX_ALIKE, Phase, UnitQueue, plan_phases, plan_units

unhurried = settings(max_examples=50, deadline=None)  # other sessions share the machine


def plan(seed=0, classes=(0, 1, 2, 3, 4), images=12, per_unit=4, pack=2):
    return plan_units(
        seed=seed,
        classes=classes,
        images_per_class=images,
        classes_per_unit=pack,
        images_per_class_per_unit=per_unit,
    )


def class_seeds(units):
    """Seeds of each class, in the order of the repeats."""
    found = {}
    for unit in units:
        for label, seed in zip(unit.request.classes, unit.request.class_seeds, strict=True):
            found.setdefault(label, []).append(seed)
    return found


# Seeds


@unhurried
@given(st.lists(st.integers() | st.text("abc019-", min_size=1), min_size=1, max_size=4), st.data())
def test_seed_depends_on_every_part(parts, data):
    index = data.draw(st.integers(0, len(parts) - 1))
    other = [*parts[:index], f"{parts[index]}?", *parts[index + 1 :]]
    assert derive_seed(*parts) != derive_seed(*other)


def test_seed_depends_on_the_order_and_the_borders_of_its_parts():
    assert len({derive_seed("a", "bc"), derive_seed("ab", "c"), derive_seed("bc", "a"), derive_seed("abc")}) == 4


@unhurried
@given(st.lists(st.integers(), min_size=1, max_size=4))
def test_seed_has_63_bits_and_is_always_the_same(parts):
    assert 0 <= derive_seed(*parts) < 2**63
    assert derive_seed(*parts) == derive_seed(*parts)


def test_seed_is_the_front_of_a_digest_so_that_every_machine_agrees():
    assert derive_seed(0, "student") == int(hashlib.sha256(b"0\x1fstudent").hexdigest()[:16], 16) // 2


# Plan


@unhurried
@given(
    classes=st.lists(st.integers(0, 300), min_size=1, max_size=12, unique=True),
    pack=st.integers(1, 13),
    repeats=st.integers(1, 4),
    per_unit=st.integers(1, 5),
)
def test_plan_covers_every_class_exactly(classes, pack, repeats, per_unit):
    units = plan(classes=classes, images=repeats * per_unit, per_unit=per_unit, pack=pack)
    images = Counter()
    for unit in units:
        assert 1 <= len(unit.request.classes) <= pack
        assert unit.request.count == len(unit.request.classes) * per_unit
        images.update(dict.fromkeys(unit.request.classes, unit.request.images_per_class))
    assert images == dict.fromkeys(classes, repeats * per_unit)
    assert len({unit.id for unit in units}) == len(units)


@unhurried
@given(shorter=st.integers(1, 4), more=st.integers(1, 4), pack=st.integers(1, 5))
def test_longer_plan_begins_with_the_shorter(shorter, more, pack):
    short = plan(images=4 * shorter, pack=pack)
    assert plan(images=4 * (shorter + more), pack=pack)[: len(short)] == short


@pytest.mark.parametrize("pack", [2, 3, 5])
def test_seeds_of_a_class_do_not_depend_on_who_shares_its_pack(pack):
    assert class_seeds(plan(pack=pack)) == class_seeds(plan(pack=1))
    assert class_seeds(plan(pack=pack, classes=(4, 2)))[2] == class_seeds(plan(pack=1))[2]


def test_seed_of_a_repeat_is_common_to_its_packs_and_to_no_other():
    units = plan()
    by_repeat = {}
    for unit in units:
        by_repeat.setdefault(unit.id.partition("-")[0], set()).add(unit.request.seed)
    assert [len(seeds) for seeds in by_repeat.values()] == [1, 1, 1]
    assert len(set.union(*by_repeat.values())) == 3


def test_no_two_classes_or_repeats_share_a_seed():
    seeds = [seed for of_class in class_seeds(plan()).values() for seed in of_class]
    assert len(set(seeds)) == len(seeds) == 15


def test_plans_of_different_seeds_have_no_seed_in_common():
    one, other = ({unit.request.seed for unit in plan(seed)} for seed in (0, 1))
    assert not one & other


def test_first_units_cover_all_classes():
    covered = [label for unit in plan()[:3] for label in unit.request.classes]
    assert covered == [0, 1, 2, 3, 4]


def test_units_are_named_after_their_repeat_and_classes():
    assert [unit.id for unit in plan(images=8, pack=3)] == [
        "r000-c0000-0002",
        "r000-c0003-0004",
        "r001-c0000-0002",
        "r001-c0003-0004",
    ]


def test_packs_with_the_same_first_and_last_class_have_different_names():
    packs = [(0, 1, 3), (0, 2, 3), (0, 3), (0, 1, 2, 3)]
    assert len({plan(classes=pack, pack=4)[0].id for pack in packs}) == 4


def test_seeds_of_a_unit_are_those_of_its_classes_and_repeat_and_reach_a_worker_as_they_are():
    unit = plan(seed=7, pack=3)[2]
    assert unit.id == "r001-c0000-0002"
    expected = [derive_seed(7, "class", label, 1) for label in (0, 1, 2)]
    assert list(unit.request.class_seeds) == expected
    assert list(unit.request.class_seeds[1:]) == expected[1:]
    assert pickle.loads(pickle.dumps(unit)) == unit


def test_unit_takes_no_more_memory_where_its_pack_has_more_classes():
    assert bytes_per_unit(pack=100) < 1.2 * bytes_per_unit(pack=1) < 400


def bytes_per_unit(pack):
    tracemalloc.start()
    units = plan(classes=tuple(range(pack)), images=2000, per_unit=1, pack=pack)
    try:
        return tracemalloc.get_traced_memory()[0] / len(units)
    finally:
        tracemalloc.stop()


# Phases


def phases_of(*, repeats, rounds, steps):
    units = plan(images=4 * repeats)
    return units, plan_phases(units, repeats=repeats, rounds=rounds, steps=steps)


def test_one_round_is_one_phase_that_follows_the_newest_student():
    units, phases = phases_of(repeats=3, rounds=1, steps=7)
    assert phases == (Phase(units=units, until_step=7, student_version="newest"),)


@unhurried
@given(rounds=st.integers(2, 4), each=st.integers(1, 3), steps=st.integers(4, 50))
def test_phases_share_out_whole_repeats_and_the_steps_and_look_back_at_the_phase_before(rounds, each, steps):
    units, phases = phases_of(repeats=rounds * each, rounds=rounds, steps=steps)
    assert len(phases) == rounds
    for number, phase in enumerate(phases):
        made_before = phases[number - 1].units if number else ()
        assert phase.units[: len(made_before)] == made_before, "those of earlier phases are included"
        repeats = {unit.repeat for unit in phase.units[len(made_before) :]}
        assert repeats == set(range(number * each, (number + 1) * each))
        assert phase.student_version == (phases[number - 1].until_step if number else None)
    ends = [phase.until_step for phase in phases]
    assert ends == sorted(set(ends)), "each phase makes a step at least"
    assert (phases[-1].units, ends[-1]) == (units, steps)


def test_plan_without_units_is_a_phase_of_steps_alone():
    assert plan_phases((), repeats=0, rounds=1, steps=9) == (Phase(units=(), until_step=9),)


# Queue


UNITS = plan(classes=(0, 1, 2, 3), images=4, pack=1)


def test_units_are_handed_out_in_the_order_of_the_plan():
    queue = UnitQueue(UNITS)
    assert [queue.take() for _ in range(5)] == [*UNITS, None]
    assert (queue.attempted, queue.num_running, queue.is_drained) == (4, 4, False)


def test_units_done_in_earlier_runs_are_never_handed_out():
    queue = UnitQueue(UNITS, done=[UNITS[0].id, UNITS[2].id, "r000-c0099-0099"])
    assert queue.num_open == 2
    assert [queue.take() for _ in range(3)] == [UNITS[1], UNITS[3], None]


def test_queue_of_a_finished_run_is_drained_from_the_start():
    queue = UnitQueue(UNITS, done=[unit.id for unit in UNITS])
    assert queue.is_drained
    assert queue.take() is None
    assert queue.attempted == 0


def test_unit_lost_with_its_machine_is_requeued_first_without_counting_an_attempt():
    queue = UnitQueue(UNITS, max_attempts=1, max_losses=1)
    unit = queue.take()
    for _ in range(10):
        assert queue.lost(unit, preempted=True) is None
        assert queue.attempt_of(unit) == 1
        assert queue.take() == unit
    assert queue.given_up == ()


def test_unit_whose_worker_died_goes_to_the_back_so_that_a_bad_machine_gets_another():
    queue = UnitQueue(UNITS, max_attempts=1)
    unit = queue.take()
    assert queue.lost(unit) is None
    assert [queue.take() for _ in UNITS] == [*UNITS[1:], unit]
    assert queue.attempt_of(unit) == 1


def test_unit_that_kills_its_worker_each_time_is_set_aside_and_the_error_says_so():
    queue = UnitQueue(UNITS[:1], max_losses=3)
    unit = queue.take()
    for _ in range(2):
        assert queue.lost(unit) is None
        assert queue.take() == unit
        assert queue.lost(unit, preempted=True) is None, "nobody's fault, and no interruption of the row either"
        assert queue.take() == unit
    failure = queue.lost(unit)
    assert failure.error.startswith("killed its worker 3 times in a row")
    assert queue.given_up == (failure,)
    assert queue.is_given_up(unit)
    assert queue.is_drained


def test_unit_that_gets_further_before_each_death_is_not_to_blame_for_its_machines():
    queue = UnitQueue(UNITS[:1], max_losses=2)
    for step in range(1, 20):
        unit = queue.take()
        queue.progressed(unit.id, 100 * step)
        assert queue.lost(unit) is None
    queue.progressed(queue.take().id, 1900)
    assert queue.lost(UNITS[0]).error.startswith("killed its worker 2 times in a row")


def test_progress_of_a_unit_that_nobody_works_on_any_more_tells_nothing():
    queue = UnitQueue(UNITS[:1], max_losses=2)
    queue.lost(queue.take())
    queue.progressed(UNITS[0].id, 500)
    assert queue.lost(queue.take()) is not None


def many(count):
    return plan(classes=tuple(range(count)), images=4, pack=1)


def test_units_that_all_fail_alike_show_that_it_is_nothing_about_them():
    queue = UnitQueue(many(9))
    for number in range(MAX_ALIKE):
        assert queue.lasting_failure is None
        unit = queue.take()
        queue.failed(unit, f"StoreError: s3://b/parts/{unit.id}-1-{number:032x}-0.parquet cannot be written (full)")
    assert queue.lasting_failure.startswith("5 units in a row failed alike and none was done: StoreError: s3://b/")
    assert "cannot be written (full)" in queue.lasting_failure


def test_one_unit_that_fails_often_shows_nothing_about_the_others():
    queue = UnitQueue(UNITS[:1], max_attempts=9)
    for _ in range(8):
        queue.failed(queue.take(), "no luck")
    assert queue.lasting_failure is None


@pytest.mark.parametrize("between", [lambda queue: queue.finished(queue.take()),
                                     lambda queue: queue.failed(queue.take(), "something else")])  # fmt: skip
def test_a_unit_that_is_done_or_fails_otherwise_shows_that_there_is_no_lasting_failure(between):
    queue = UnitQueue(many(9))
    for _ in range(MAX_ALIKE - 1):
        queue.failed(queue.take(), "no luck")
    between(queue)
    queue.failed(queue.take(), "no luck")
    assert queue.lasting_failure is None


def test_failure_interrupts_a_row_of_deaths():
    queue = UnitQueue(UNITS[:1], max_losses=2)
    for end in (queue.lost, lambda unit: queue.failed(unit, "no luck"), queue.lost):
        end(queue.take())
    assert queue.take() == UNITS[0]


def test_unit_that_never_works_is_given_up_after_as_many_attempts_as_the_limits_allow():
    queue = UnitQueue(UNITS, max_attempts=3, max_losses=5)
    row = Counter()
    while (unit := queue.take()) is not None:
        row[unit.id] += 1
        if row[unit.id] % 5:
            queue.lost(unit)
        else:
            queue.failed(unit, "no luck")
    assert queue.is_drained
    assert queue.attempted == 3 * 5 * len(UNITS)


def test_unit_that_fails_goes_to_the_back_and_is_set_aside_at_the_last_attempt():
    queue = UnitQueue(UNITS[:2], max_attempts=2)
    first = queue.take()
    assert queue.failed(first, "no luck").attempt == 1
    second = queue.take()
    assert second == UNITS[1]
    queue.finished(second)
    assert queue.take() == first
    assert queue.attempt_of(first) == 2
    failure = queue.failed(first, "again")
    assert (failure.unit, failure.attempt, failure.error) == (first.id, 2, "again")
    assert queue.given_up == (failure,)
    assert queue.take() is None
    assert queue.is_drained


def test_unit_finished_by_another_attempt_while_it_waited_is_not_handed_out_again():
    queue = UnitQueue(UNITS[:1])
    unit = queue.take()
    queue.lost(unit)
    queue.finished(unit)
    assert queue.is_drained
    assert queue.take() is None


def test_last_failure_of_a_unit_that_was_thought_lost_sets_it_aside_while_it_waits():
    queue = UnitQueue(UNITS[:1], max_attempts=1)
    unit = queue.take()
    queue.lost(unit)
    queue.failed(unit, "no luck")
    assert queue.take() is None
    assert queue.is_drained


def test_result_that_arrives_after_a_unit_was_given_up_is_welcome():
    queue = UnitQueue(UNITS[:1], max_attempts=1)
    unit = queue.take()
    queue.failed(unit, "no luck")
    queue.finished(unit)
    assert queue.given_up == ()
    assert queue.is_drained


class Queue(RuleBasedStateMachine):
    """Any order of events, of running units and of those that are not, beside a model."""

    @initialize(
        count=st.integers(1, 6),
        max_attempts=st.integers(1, 3),
        max_losses=st.integers(1, 3),
        done=st.sets(st.integers(0, 6), max_size=3),
    )
    def begin(self, count, max_attempts, max_losses, done):
        self.units = {unit.id: unit for unit in plan(classes=tuple(range(count)), images=4, pack=1)}
        self.earlier = {unit_id for number, unit_id in enumerate(self.units) if number in done}
        self.max_attempts, self.max_losses = max_attempts, max_losses
        self.queue = UnitQueue(
            list(self.units.values()), done=self.earlier, max_attempts=max_attempts, max_losses=max_losses
        )
        self.waiting = [unit_id for unit_id in self.units if unit_id not in self.earlier]
        self.running, self.done, self.set_aside = set(), set(self.earlier), set()
        self.taken, self.failures, self.losses, self.row = Counter(), Counter(), Counter(), Counter()
        self.all_failures, self.reopened, self.reached = Counter(), Counter(), Counter()

    def one_that_was_taken(self, data):
        return data.draw(st.sampled_from(sorted(self.taken)))

    def move(self, unit_id, to):
        """Out of the one state it is in; ``to`` puts it into another."""
        for state in (self.running, self.done, self.set_aside):
            state.discard(unit_id)
        if unit_id in self.waiting:
            self.waiting.remove(unit_id)
        to(unit_id)

    @rule()
    def take(self):
        unit = self.queue.take()
        assert (unit and unit.id) == (self.waiting[0] if self.waiting else None)
        if unit is not None:
            assert self.queue.attempt_of(unit) == self.failures[unit.id] + 1
            self.taken[unit.id] += 1
            self.move(unit.id, self.running.add)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def finish(self, data):
        unit_id = self.one_that_was_taken(data)
        assert self.queue.finished(self.units[unit_id]) == (unit_id not in self.done)
        self.move(unit_id, self.done.add)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def fail(self, data):
        unit_id = self.one_that_was_taken(data)
        assert self.queue.failed(self.units[unit_id], "no luck").attempt == self.failures[unit_id] + 1
        if unit_id in self.done | self.set_aside:
            return
        self.failures[unit_id] += 1
        self.all_failures[unit_id] += 1
        self.row[unit_id] = 0
        if self.failures[unit_id] == self.max_attempts:
            self.move(unit_id, self.set_aside.add)
        elif unit_id in self.running:
            self.move(unit_id, self.waiting.append)

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), preempted=st.booleans())
    def lose(self, data, preempted):
        unit_id = self.one_that_was_taken(data)
        failure = self.queue.lost(self.units[unit_id], preempted=preempted)
        is_news = unit_id in self.running
        self.losses[unit_id] += is_news
        self.row[unit_id] += is_news and not preempted
        is_last = is_news and not preempted and self.row[unit_id] == self.max_losses
        assert (failure is not None) == is_last
        if is_last:
            self.move(unit_id, self.set_aside.add)
        elif is_news and preempted:
            self.move(unit_id, lambda lost: self.waiting.insert(0, lost))
        elif is_news:
            self.move(unit_id, self.waiting.append)

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), step=st.integers(0, 5))
    def progress(self, data, step):
        unit_id = self.one_that_was_taken(data)
        self.queue.progressed(unit_id, step)
        if unit_id in self.running and step > self.reached[unit_id]:
            self.reached[unit_id] = step
            self.row[unit_id] = 0

    @rule(data=st.data())
    def finish_elsewhere(self, data):
        units = data.draw(st.sets(st.sampled_from(sorted(self.units)), max_size=3))
        self.queue.finished_elsewhere([*units, "another plan's"])
        for unit_id in units:
            self.move(unit_id, self.done.add)

    @rule(data=st.data())
    def reopen(self, data):
        unit_id = data.draw(st.sampled_from(sorted(self.units)))
        self.queue.reopened(self.units[unit_id])
        if unit_id in self.done:
            self.move(unit_id, self.waiting.append)
            self.earlier.discard(unit_id)
            self.reopened[unit_id] += 1
            self.failures[unit_id] = self.row[unit_id] = self.reached[unit_id] = 0

    @invariant()
    def each_unit_is_in_exactly_one_state(self):
        assert self.queue.num_open == len(self.units) - len(self.done) - len(self.set_aside)
        assert self.queue.num_running == len(self.running)
        assert self.queue.attempted == self.taken.total()
        assert {failure.unit for failure in self.queue.given_up} == self.set_aside
        assert {unit_id for unit_id, unit in self.units.items() if self.queue.is_given_up(unit)} == self.set_aside
        assert Counter([*self.waiting, *self.running, *self.done, *self.set_aside]) == Counter(self.units.keys())

    @invariant()
    def no_unit_is_worked_on_more_often_than_it_failed_or_was_lost_and_once(self):
        for unit_id, times in self.taken.items():
            assert unit_id not in self.earlier, "it was done and has not been reopened"
            assert times <= 1 + self.all_failures[unit_id] + self.losses[unit_id] + self.reopened[unit_id]

    @invariant()
    def only_too_many_failures_or_deaths_set_a_unit_aside(self):
        for failure in self.queue.given_up:
            if failure.error == "no luck":
                assert failure.attempt == self.failures[failure.unit] == self.max_attempts
            else:
                assert self.failures[failure.unit] < self.max_attempts
                assert f"killed its worker {self.max_losses} times" in failure.error

    @invariant()
    def it_is_drained_when_every_unit_is_done_or_set_aside(self):
        assert self.queue.is_drained == (self.units.keys() == self.done | self.set_aside)

    def teardown(self):
        for unit_id in list(self.running):
            self.queue.lost(self.units[unit_id])
        while (unit := self.queue.take()) is not None:
            self.queue.finished(unit)
            self.done.add(unit.id)
        assert self.queue.is_drained
        given_up = {failure.unit for failure in self.queue.given_up}
        assert not given_up & self.done
        assert given_up | self.done == self.units.keys()


Queue.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_queue_keeps_its_promises_in_any_order_of_events = Queue.TestCase


@pytest.mark.cluster
def test_queue_keeps_its_promises_in_a_thousand_orders():
    run_state_machine_as_test(Queue, settings=settings(max_examples=1000, stateful_step_count=40, deadline=None))
