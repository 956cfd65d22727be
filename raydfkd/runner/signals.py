"""Ctrl-C and SIGTERM as a request that a run can answer in order."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Within it, the first Ctrl-C or SIGTERM is a request to end in order, and a second one ends at once.

    Where it is entered on another than the main thread, which gets no signals, nothing is ever requested. The
    handlers that were there return with its end.
    """

    def __init__(self) -> None:
        self._requested_at: float | None = None
        self.is_repeated = False
        """Whether the run is to end at once, and is ending with a KeyboardInterrupt."""
        self._before: dict[signal.Signals, Any] = {}

    @property
    def is_requested(self) -> bool:
        """Whether the run is to end."""
        return self._requested_at is not None

    @property
    def seconds(self) -> float:
        """Time since the request; 0 while there is none."""
        return 0.0 if self._requested_at is None else time.monotonic() - self._requested_at

    def __enter__(self) -> Interruption:
        """Listen."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Listen no more."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.is_requested:
            self.is_repeated = True
            raise KeyboardInterrupt
        self._requested_at = time.monotonic()
        os.write(2, b"\nstopping within 10 s, what is in work first; the same again stops now\n")  # signal-safe
