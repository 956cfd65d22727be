"""Work on threads beside the device: many requests at once, calls in order, and items made ahead of their use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_threads(call: Callable[[T], R], items: Sequence[T], *, threads: int) -> Iterator[R]:
    """Yield ``call`` of each item in their order, up to ``threads`` at once; none is begun after one has raised.

    Results wait until they are taken, so they should be small.
    """
    if len(items) < 2:
        yield from map(call, items)
        return
    with ThreadPoolExecutor(min(threads, len(items))) as pool:
        yield from pool.map(call, items)


class OrderedCalls:
    """Makes calls one after another on a thread of its own.

    The first one that raises is the last one made; its error is raised here, by every later ``submit`` and ``drain``.

    Args:
        waiting: calls that may wait to be made; ``submit`` blocks while there are more.
    """

    def __init__(self, *, waiting: int) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="raydfkd-calls")
        self._waiting = waiting
        self._pending: deque[Future[None]] = deque()
        self._error: Exception | None = None

    def submit(self, call: Callable[[], None]) -> None:
        """Make ``call`` after those before it."""
        while len(self._pending) > self._waiting:
            self._pending.popleft().result()
        self._raise_error()
        self._pending.append(self._executor.submit(self._make, call))

    def drain(self) -> None:
        """Wait until all calls are made; more may follow."""
        while self._pending:
            self._pending.popleft().result()
        self._raise_error()

    def stop(self) -> None:
        """End the thread once the call that it is making returns; those that wait are never made."""
        self._executor.shutdown(cancel_futures=True)
        self._pending.clear()

    def _make(self, call: Callable[[], None]) -> None:
        if self._error is None:
            try:
                call()
            except Exception as error:  # kept for the thread that submitted the call
                self._error = error

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


def ahead(items: Generator[T], *, depth: int) -> Generator[T]:
    """Yield the same items in the same order, up to ``depth`` of them made ahead on a thread.

    Closing the iterator, or dropping it, waits for the item that is being made and closes ``items``.
    """
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="raydfkd-ahead") as executor:
        pending = deque(executor.submit(next, items, end) for _ in range(depth))
        try:
            while (item := pending.popleft().result()) is not end:
                pending.append(executor.submit(next, items, end))
                yield item  # type: ignore[misc]  # not the sentinel, so a T
        finally:
            executor.shutdown(cancel_futures=True)
            items.close()
