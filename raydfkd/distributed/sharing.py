"""Synthesis and training on one cluster, neither of which may keep the other waiting for ever."""

from __future__ import annotations

import time
from collections.abc import Callable

from raydfkd.distributed.pool import SynthesisPool
from raydfkd.distributed.room import fits_at_once
from raydfkd.distributed.train_job import Training
from raydfkd.job import Job

STARVED_S = 60.0
"""How long the training may wait for images while no worker can make any, before it gives its room to one."""


class Sharing:
    """Begins the training beside the synthesis where there is room for both, and where there is not, after it.

    Train workers hold what they reserve while they wait for images. Where that is all there is, or has become so
    because machines went away, no image would ever be made. So without room for both the synthesis goes first, and a
    training that waits while no worker is at work ends with a checkpoint, to go on once one is.

    Args:
        job: what is run.
        pool: makes the images.
        training: trains on them.
        say: tells people one line: its topic and its text.
    """

    def __init__(self, job: Job, pool: SynthesisPool, training: Training, say: Callable[[str, str], None]) -> None:
        self._job, self._pool, self._training, self._say = job, pool, training, say
        self._was_at_work = time.monotonic()

    def begin(self) -> None:
        """Begin the training if there is room for it and for a worker."""
        if fits_at_once(self._job):
            self._training.begin()
        else:
            self._say("student", "there is no room for its training and for synthesis at once; the images come first")

    def look(self) -> None:
        """Called again and again while images are made."""
        now = time.monotonic()
        if self._pool.is_at_work or not self._training.is_waiting:
            self._was_at_work = now
        if self._pool.is_at_work:
            self._training.begin()  # which waits for room, or for a node to join
        elif now - self._was_at_work > STARVED_S:
            self._was_at_work = now
            self._training.pause()
            self._say("student", "gives its room to the synthesis, which has none left; goes on once images are made")
        self._training.look()
