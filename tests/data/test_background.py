from __future__ import annotations

import itertools
import threading

import pytest

from raydfkd.data.background import OrderedCalls, ahead


@pytest.fixture
def calls():
    made = OrderedCalls(waiting=1)
    yield made
    made.stop()


def fail():
    raise OSError("disk full")


def test_calls_are_made_in_their_order_on_another_thread(calls):
    made = []
    for number in range(20):
        calls.submit(lambda number=number: made.append((number, threading.current_thread())))
    calls.drain()
    assert [number for number, _ in made] == list(range(20))
    assert {thread for _, thread in made} & {threading.current_thread()} == set()


def test_no_call_is_made_after_one_that_failed_and_its_error_stays(calls):
    made = []
    calls.submit(fail)
    with pytest.raises(OSError, match="disk full"):  # noqa: PT012 - whichever comes after the failure
        for _ in range(3):
            calls.submit(lambda: made.append(1))
    for _ in range(2):
        with pytest.raises(OSError, match="disk full"):
            calls.drain()
    assert made == []


def test_stopping_waits_for_the_call_that_is_being_made_and_drops_the_rest(calls):
    begun, allowed, made = threading.Event(), threading.Event(), []

    def slow():
        begun.set()
        assert allowed.wait(5)
        made.append("slow")

    calls.submit(slow)
    calls.submit(lambda: made.append("never"))
    assert begun.wait(5)
    threading.Timer(0.02, allowed.set).start()
    calls.stop()
    assert made == ["slow"]


@pytest.mark.parametrize("depth", [1, 3, 100])
def test_items_made_ahead_are_the_same_in_the_same_order(depth):
    assert list(ahead((number for number in range(10)), depth=depth)) == list(range(10))


def test_no_more_items_are_made_ahead_than_asked_for():
    made, taken = itertools.count(), 0

    def numbers():
        yield from made

    stream = ahead(numbers(), depth=3)
    for _ in range(10):
        next(stream)
        taken += 1
    stream.close()
    assert next(made) <= taken + 3


def test_items_before_an_error_are_handed_out_and_then_it_is_raised():
    def numbers():
        yield 1
        yield 2
        raise OSError("gone")

    stream = ahead(numbers(), depth=4)
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(OSError, match="gone"):
        next(stream)


def test_closing_the_stream_closes_what_it_was_made_from():
    closed = []

    def numbers():
        try:
            yield from itertools.count()
        finally:
            closed.append(True)

    stream = ahead(numbers(), depth=2)
    next(stream)
    stream.close()
    assert closed == [True]
