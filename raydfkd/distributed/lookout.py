"""The look at what others do to a transfer set, beside the thread that hands out its units."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

from raydfkd.data.commit_log import Progress
from raydfkd.job import Job
from raydfkd.units import UnitQueue

LOOK_EVERY_S = 5.0
"""Seconds between looks at what others have committed to the set or taken out of it."""


class Lookout:
    """Looks at a job's set on a thread of its own, since a store may take seconds to list it or not answer at all.

    Args:
        job: whose set it is.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._look: Future[Progress | None] | None = None
        self._next = time.monotonic()

    def tell(self, queue: UnitQueue) -> None:
        """Tell the queue what is known by now; where it is drained, look once more and wait for that.

        Raises:
            OutageError: the store is out of reach; the next call looks again.
        """
        if self._look is not None and (queue.is_drained or self._look.done()):
            self._take(self._look, queue)
        if queue.is_drained:  # whatever was seen before is older than the last commit
            self._take(self._begun(at_once=True), queue)
        elif self._look is None and time.monotonic() >= self._next:
            self._look = self._begun(at_once=False)

    def _begun(self, *, at_once: bool) -> Future[Progress | None]:
        look: Future[Progress | None] = Future()

        def run() -> None:
            try:
                look.set_result(self._job.news(at_once=at_once))
            except BaseException as error:
                look.set_exception(error)

        threading.Thread(target=run, name="lookout", daemon=True).start()  # nobody waits for it once the run is over
        return look

    def _take(self, look: Future[Progress | None], queue: UnitQueue) -> None:
        self._look = None
        try:
            news = look.result()
        finally:
            self._next = time.monotonic() + LOOK_EVERY_S
        if news is not None:
            self._job.catch_up(queue, news)
