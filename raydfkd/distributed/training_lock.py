"""One driver at a time trains a student."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)
POLL_S = 0.5


@contextmanager
def training_lock(path: Path, on_wait: Callable[[str], None], is_over: Callable[[], bool]) -> Iterator[bool]:
    """Hold the lock ``path`` meanwhile; yields whether it had to be waited for.

    The kernel gives a lock back the moment its process ends, however it does: a driver that is killed and started
    again waits for nothing, and no clock is asked. Network file systems do the same between machines (NFS 4, Lustre
    mounted with flock). On one without locks drivers do not see each other, which a warning says.

    Args:
        path: a file that stays: to remove it would let two drivers hold locks of the same name.
        on_wait: told once, before waiting, who holds the lock.
        is_over: whether to wait no longer.

    Raises:
        TimeoutError: it was over before the lock was free.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        is_waiting = False
        while not _is_taken(path, file.fileno()):
            if not is_waiting:
                on_wait(path.read_text() or "somebody")
                is_waiting = True
            if is_over():
                raise TimeoutError(f"{path} was not free in time")
            time.sleep(POLL_S)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield is_waiting


def _is_taken(path: Path, descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning("%s cannot be locked (%s): do not run the same recipe twice at once here", path, error.strerror)
    return True
