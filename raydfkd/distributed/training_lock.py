"""The lock that lets one driver at a time train a student."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)
POLL_S = 0.5


@contextmanager
def training_lock(path: Path, on_wait: Callable[[str], None], is_over: Callable[[], bool]) -> Iterator[bool]:
    """Hold the lock ``path`` meanwhile; yields whether it had to be waited for.

    The kernel gives a lock back the moment its process ends, however it does: a driver that is killed and started
    again waits for nothing, and no clock is asked. Network file systems do the same between machines (NFS 4, Lustre
    mounted with flock). On one without locks drivers do not see each other, which a warning says.

    Args:
        path: a file that stays: to remove it would let two drivers hold locks of the same name. Beside it, ``.holder``
            says who holds it.
        on_wait: told once, before waiting, who holds the lock.
        is_over: whether to wait no longer.

    Raises:
        TimeoutError: it was over before the lock was free.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = path.with_suffix(".holder")
    lock = FileLock(path, fallback_to_soft=False, preserve_lock_file=True)
    is_waiting = False
    while not _is_taken(lock, wait_s=POLL_S if is_waiting else 0.0):
        if not is_waiting:
            on_wait(_read(holder))
            is_waiting = True
        if is_over():
            raise TimeoutError(f"{path} was not free in time")
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield is_waiting
    finally:
        lock.release()


def _is_taken(lock: FileLock, *, wait_s: float) -> bool:
    try:
        lock.acquire(timeout=wait_s)
    except Timeout:
        return False
    except OSError as error:
        path = lock.lock_file
        logger.warning("%s cannot be locked (%s): do not run the same recipe twice at once here", path, error.strerror)
    return True


def _read(holder: Path) -> str:
    try:
        return holder.read_text() or "somebody"
    except FileNotFoundError:  # who has the lock has not come to write it yet
        return "somebody"
