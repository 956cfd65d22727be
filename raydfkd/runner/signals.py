"""Ctrl-C and SIGTERM as a request that a run can answer in order."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPING = "stopping within 10 s, what is in work first; the same again stops now"


class Interruption:
    """A block within which the first Ctrl-C or SIGTERM is a request to end in order, and a second one ends at once.

    Where it is entered on another than the main thread, which gets no signals, nothing is ever requested. The
    earlier handlers are put back when it ends.

    Args:
        on_request: told once, at once, the line for people; for displays that draw on the terminal, which would
            overwrite a line that is written past them. It is called on a thread of its own, since the signal may come
            while the main thread holds the display's lock. Without it the line is written to standard error.
    """

    def __init__(self, on_request: Callable[[str], None] | None = None) -> None:
        self._on_request = on_request
        self._requested_at: float | None = None
        self.is_repeated = False
        """Whether the run is to end at once, and is ending with a KeyboardInterrupt."""
        self._before: dict[signal.Signals, Any] = {}
        self._bell: tuple[int, int] | None = None
        self._teller: threading.Thread | None = None

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
            if self._on_request is not None:
                self._bell = os.pipe()
                self._teller = threading.Thread(
                    target=self._tell, args=(self._bell[0],), name="interruption", daemon=True
                )
                self._teller.start()
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Listen no more."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._bell is not None and self._teller is not None:
            os.close(self._bell[1])
            self._teller.join()
            os.close(self._bell[0])
            self._bell = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.is_requested:
            self.is_repeated = True
            raise KeyboardInterrupt
        self._requested_at = time.monotonic()
        if self._bell is not None:
            os.write(self._bell[1], b"!")
        else:
            with contextlib.suppress(OSError):  # a terminal that has gone away is no reason not to save
                os.write(2, f"\n{STOPPING}\n".encode())

    def _tell(self, bell: int) -> None:
        """Wait for the bell, or for the end."""
        if os.read(bell, 1) and self._on_request is not None:
            self._on_request(STOPPING)
