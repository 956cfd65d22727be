"""News of a transfer set for those who look again and again: one small object says whether a listing is worth it.

``changed``   a token that is new after each change of commits or quarantine
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Generic, TypeVar
from uuid import uuid4

from raydfkd.store.errors import StoreError
from raydfkd.store.store import Store

T = TypeVar("T")
LOOK_ANYWAY_S, LOOK_ANYWAY_TIMES = 60.0, 50
"""A set is listed although nobody has said that it changed after so many seconds, and so many times as long as it took
to list it: that costs 2 % of the reader's time at most."""
_MARK, _MARK_BYTES = "changed", 64


def tell_of_change(store: Store) -> None:
    """Say that the set has changed, once the change is there to be seen; a store that fails is let be."""
    with contextlib.suppress(StoreError):  # the change itself is made, and who looks finds it a little later
        # once: Google's store takes one write a second of an object, and no worker is to wait for its turn
        store.put(_MARK, uuid4().hex.encode(), attempts=1)


class Watch(Generic[T]):
    """Looks at a set only where it may have changed since the last look.

    The token is a hint and no more. It is read before each look, so a change that a look has missed is followed by
    another token. A writer that dies between a change and its token holds the news up until a look is due anyway.

    Not to be used by two threads at once.

    Args:
        store: of the set.
        look: lists the set.
        rest: pause after a look, in times of what it took; news has to wait for its end. For those who look while their
            own writers renew the token all the time.
    """

    def __init__(self, store: Store, look: Callable[[], T], *, rest: int = 0) -> None:
        self._store = store
        self._look = look
        self._rest = rest
        self._token = b""
        self._known_until = self._rests_until = float("-inf")

    def news(self, *, at_once: bool = False) -> T | None:
        """The result of a look; None where nothing has changed, which takes one request at most, however large the set.

        Args:
            at_once: whether to look in any case.

        Raises:
            StoreError: the store failed; the next call looks again.
        """
        begun = time.monotonic()
        if begun < self._rests_until and not at_once:
            return None
        token = self._read()
        if token == self._token and begun < self._known_until and not at_once:
            return None
        found = self._look()
        ended = time.monotonic()
        self._token, self._known_until = token, ended + max(LOOK_ANYWAY_S, LOOK_ANYWAY_TIMES * (ended - begun))
        self._rests_until = ended + self._rest * (ended - begun)
        return found

    def _read(self) -> bytes:
        try:
            return self._store.get(_MARK, at_most=_MARK_BYTES)
        except (FileNotFoundError, ValueError):  # there is none, or it is not ours
            return b""
