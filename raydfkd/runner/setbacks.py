"""Setbacks that a run gets over: outages of its store, failures of units."""

from __future__ import annotations

import logging
import time

from raydfkd.errors import RunError
from raydfkd.runner.events import Events
from raydfkd.store.errors import OutageError
from raydfkd.units import UnitQueue, WorkUnit

logger = logging.getLogger(__name__)
OUTAGE_S = 1800.0
"""Seconds that the store may be out of reach before the run ends."""
QUIET_S = 300.0
"""Seconds without news of an outage after which it was over."""


class Setbacks:
    """Decides what a run gets over: each outage for up to ``OUTAGE_S``, and failures unless all units fail alike.

    Nobody waits here: each operation of the store that fails has waited for about a minute itself.

    Args:
        events: told of failures, and of each outage once.
    """

    def __init__(self, events: Events) -> None:
        self._events = events
        self._began = self._last = float("-inf")

    def unit_failed(self, unit: WorkUnit, error: Exception, queue: UnitQueue) -> None:
        """Take note of an attempt that failed by itself, or because of an outage, which the unit can do nothing about.

        Raises:
            OutageError: the store has been out of reach for too long.
            RunError: units fail for a reason that they have in common.
        """
        logger.debug("unit %s failed", unit.id, exc_info=error)
        if isinstance(error, OutageError):
            queue.lost(unit, preempted=True)
            self.store_failed(error)
            return
        failure = queue.failed(unit, f"{type(error).__name__}: {error}")
        self._events.failed(failure, is_final=queue.is_given_up(unit))
        if queue.lasting_failure:
            raise RunError(f"{queue.lasting_failure}; mend that, and the same command goes on from there")

    def store_failed(self, outage: OutageError) -> None:
        """Take note of an operation that failed.

        Raises:
            OutageError: the store has been out of reach for too long.
        """
        now = time.monotonic()
        if now - self._last > QUIET_S:
            self._began = now
            self._events.say("store", f"{outage}; going on as soon as it can")
        elif now - self._began > OUTAGE_S:
            raise outage
        self._last = now
