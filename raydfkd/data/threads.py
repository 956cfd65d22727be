"""Many small requests at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_threads(call: Callable[[T], R], items: Sequence[T], *, threads: int) -> Iterator[R]:
    """``call`` of each item, in their order, on up to ``threads`` at once; what was not begun is not, once one raises.

    Results wait until they are taken, so they should be small.
    """
    if len(items) < 2:
        yield from map(call, items)
        return
    with ThreadPoolExecutor(min(threads, len(items))) as pool:
        yield from pool.map(call, items)
