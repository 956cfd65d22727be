"""Whether the machine of this process is about to be taken away."""

from __future__ import annotations

import logging
import time

import ray

from raydfkd.distributed.ray_internals import draining_nodes

logger = logging.getLogger(__name__)
POLL_S = 1.0


class DrainNotice:
    """Asks Ray whether this node is being drained, since Ray tells an actor nothing; under a millisecond a second.

    The call is private. Where it fails, nothing is ever noticed and units are lost with their machine, which is what
    happens without a notice too.
    """

    def __init__(self) -> None:
        self._node = ray.get_runtime_context().get_node_id()
        self._next_look = 0.0
        self._is_draining = False

    def __call__(self) -> bool:
        """Whether this node is being drained; looked up once a second at most."""
        now = time.monotonic()
        if not self._is_draining and now >= self._next_look:
            self._next_look = now + POLL_S
            try:
                self._is_draining = self._node in draining_nodes()
            except Exception as error:  # whatever a private call may raise
                logger.warning("Ray cannot be asked for drained nodes (%s: %s)", type(error).__name__, error)
                self._next_look = float("inf")
        return self._is_draining
