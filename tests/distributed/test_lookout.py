"""The look at a set: beside the thread that hands out units, but before the end in any case."""

from __future__ import annotations

import threading

import pytest

from raydfkd.data.commit_log import Progress
from raydfkd.distributed import lookout
from raydfkd.distributed.lookout import LOOK_EVERY_S, Lookout
from raydfkd.store.errors import OutageError
from raydfkd.units import UnitQueue, plan_units

UNITS = plan_units(seed=0, classes=(0, 1), images_per_class=4, classes_per_unit=1, images_per_class_per_unit=4)


class SlowSet:
    """A job whose set is looked at only as long as ``is_open``."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.asked: list[bool] = []
        self.error: Exception | None = None

    def news(self, *, at_once: bool) -> Progress | None:
        self.asked.append(at_once)
        assert self.is_open.wait(30)
        if self.error is not None:
            raise self.error
        return Progress(committed={UNITS[0].id}, damaged=set())

    def catch_up(self, queue: UnitQueue, news: Progress) -> None:
        queue.finished_elsewhere(news.committed)


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets, in seconds."""
    now = [0.0]
    monkeypatch.setattr(lookout.time, "monotonic", lambda: now[0])
    return now


def test_a_set_that_takes_long_to_list_keeps_nobody_waiting(clock):
    slow, queue = SlowSet(), UnitQueue(UNITS)
    watch = Lookout(slow)
    watch.tell(queue)
    watch.tell(queue)
    assert slow.asked == [False], "one look at a time"
    assert queue.num_open == 2
    slow.is_open.set()
    watch._look.result(30)
    watch.tell(queue)
    assert queue.num_open == 1


def test_looks_are_a_while_apart(clock):
    slow, queue = SlowSet(), UnitQueue(UNITS)
    slow.is_open.set()
    watch = Lookout(slow)
    watch.tell(queue)
    watch._look.result(30)
    watch.tell(queue)
    clock[0] += LOOK_EVERY_S - 1
    watch.tell(queue)
    assert len(slow.asked) == 1
    clock[0] += 1
    watch.tell(queue)
    watch._look.result(30)
    assert len(slow.asked) == 2


def test_a_queue_that_seems_to_be_at_its_end_is_told_what_is_there_now(clock):
    slow, queue = SlowSet(), UnitQueue(UNITS, done=[unit.id for unit in UNITS])
    slow.is_open.set()
    Lookout(slow).tell(queue)
    assert slow.asked == [True]


def test_an_outage_is_raised_where_it_can_be_waited_for_and_looked_at_again(clock):
    slow, queue = SlowSet(), UnitQueue(UNITS)
    slow.error = OutageError("s3://b/set/commits cannot be listed")
    slow.is_open.set()
    watch = Lookout(slow)
    watch.tell(queue)
    watch._look.exception(30)
    with pytest.raises(OutageError):
        watch.tell(queue)
    slow.error = None
    clock[0] += LOOK_EVERY_S
    watch.tell(queue)
    watch._look.result(30)
    watch.tell(queue)
    assert queue.num_open == 1
