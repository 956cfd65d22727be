"""The student's newest version through Ray's object store: a shorter way than the set's store, never the only one."""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError

from raydfkd.distill.published import UNPUBLISHED, Announce, Source, State

logger = logging.getLogger(__name__)

ANSWER_S = 1.0
"""How long a worker waits for the board; for one that is late no later look waits."""
FETCH_S = 10.0
"""How long a worker waits for weights before it reads the store instead."""


def announce_on(board: Any) -> Announce:
    """Pins versions to a :class:`~raydfkd.distributed.board.ProgressBoard`."""

    def announce(version: int, state: State) -> None:
        board.announce.remote(version, [ray.put(dict(state))])  # in a list the reference travels, not the weights

    return announce


class AnnouncedStudents:
    """The newest version that is pinned to a board; a :data:`Source`.

    Where nothing is pinned yet, the board is silent, or board or weights are lost, it is the ``stored`` one: of a
    version both have the same weights.
    """

    def __init__(self, board: Any, stored: Source) -> None:
        self._board = board
        self._stored = stored
        self._late: Any = None

    def __call__(self, than: int) -> tuple[int, State] | None:
        """See Source; one call of the board where there is nothing new."""
        question = self._board.newest.remote(than) if self._late is None else self._late
        is_answered = bool(ray.wait([question], timeout=ANSWER_S if self._late is None else 0)[0])
        self._late = None if is_answered else question
        if not is_answered:
            return self._stored(than)
        try:
            version, weights = ray.get(question)
            if version > than and weights:
                return version, ray.get(weights[0], timeout=FETCH_S)
        except (GetTimeoutError, ObjectLostError, RayActorError) as error:
            logger.info("the newest student comes from the store: %s", type(error).__name__)
            return self._stored(than)
        return self._stored(than) if version == UNPUBLISHED else None
