"""The metrics of a run as it goes: one JSON object a line."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from pydantic_core import from_json

logger = logging.getLogger(__name__)
JSON: TypeAlias = "None | bool | int | float | str | Sequence[JSON] | Mapping[str, JSON]"
BLOCK_BYTES = 1 << 16
"""Bytes that are looked at at once for the end of the last whole line."""


class MetricsLog:
    """``metrics.jsonl`` of a run: one JSON object a line, only ever appended to.

    Any thread may write, and a line is out of this process when ``write`` returns. Non-finite numbers become null, so
    that every line is JSON for every reader. The file is open from the first to the last line.
    """

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.write_bytes(b"")
        else:
            _cut_torn_line(path)
        self._file = path.open("ab", buffering=0)

    def __enter__(self) -> MetricsLog:
        """The log itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file; nothing can be written any more."""
        self._file.close()

    def write(self, event: str, **values: JSON) -> None:
        """Append one event with the time in seconds since the epoch."""
        line = json.dumps(finite({"event": event, "time": time.time(), **values}), allow_nan=False) + "\n"
        with self._lock:
            self._file.write(line.encode("ascii"))


def _cut_torn_line(path: Path) -> None:
    """Remove the last line where a killed process left it without its end: the next one must not continue it."""
    with path.open("a+b") as file:
        end = whole = file.seek(0, os.SEEK_END)
        while whole:
            begin = max(0, whole - BLOCK_BYTES)
            file.seek(begin)
            newline = file.read(whole - begin).rfind(b"\n")
            whole = begin + newline + 1
            if newline >= 0:
                break
        if whole < end:
            file.truncate(whole)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a metrics file, one after another; a file that is not there has none.

    The last line is left out where a killed process left it torn. Lines that are damaged are skipped, and that is said
    once, with the first of them.
    """
    if not path.exists():
        return
    first = skipped = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                break
            event = _event_in(line)
            if event is not None:
                yield event
            else:
                first, skipped = first or number, skipped + 1
    if skipped:
        logger.warning("%s: %d lines are damaged and left out, the first is line %d", path, skipped, first)


def _event_in(line: bytes) -> dict[str, Any] | None:
    """The event of a line; None where it is not one."""
    try:
        event = from_json(line)
    except ValueError:
        return None
    is_event = isinstance(event, dict) and isinstance(event.get("event"), str)
    return event if is_event and isinstance(event.get("time"), (int, float)) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStats:
    """The totals of all sessions of a run, from its metrics; a session that was killed counts up to its last entry."""

    seconds: float
    """Duration of all sessions."""
    synthesis_seconds: float
    """Time from the first unit's start to the last commit, in each session that made images."""
    distillation_seconds: float
    """Time from the first entry of the learning curve to the last, in each session that trained."""
    images: int
    """Images that were committed."""
    attempted: int
    """Attempts at units, those that failed or were lost included."""
    devices: tuple[str, ...]
    """Names of the devices that workers have made images on."""
    student_images: int | None
    """Images that the student's last steps were drawn from; None where nothing is known of a step."""

    @property
    def images_per_second(self) -> float:
        """Images per second of synthesis; 0 where none were made."""
        return self.images / self.synthesis_seconds if self.synthesis_seconds else 0.0


class StatsReader:
    """Adds up the sessions that worked on ``job``, event by event; of their students those of ``training``.

    Args:
        job: digest of the images.
        training: name of the student's training.
    """

    def __init__(self, *, job: str, training: str) -> None:
        self._job, self._training = job, training
        self._sessions: list[_Session] = []
        self._is_mine = False
        self._images = self._attempted = 0
        self._student_images: int | None = None
        self._devices = dict[str, None]()

    def add(self, event: Mapping[str, Any]) -> None:
        """Take the next event into account."""
        kind, time = event["event"], event["time"]
        if kind == "session":
            self._is_mine = event.get("job") == self._job
            if self._is_mine:
                self._sessions.append(_Session(time))
        if not self._is_mine:
            return
        session = self._sessions[-1]
        if kind == "synthesis":
            session.synthesis.begin(time)
        elif kind == "unit":
            session.synthesis.end(time)
            self._images += event.get("images", 0)
        elif kind == "worker":
            self._devices[event["device"]] = None
        elif kind == "student" and event.get("training", self._training) == self._training:
            session.distillation.begin(time)
            session.distillation.end(time)
            self._student_images = event.get("snapshot_images", self._student_images)
        self._attempted += kind in ("unit", "failure", "lost")
        if kind not in ("synthesis", "training", "worker"):  # which only announce a beginning: all may be done
            session.whole.end(time)

    def stats(self) -> RunStats:
        """The totals of the events so far."""
        return RunStats(
            seconds=sum(session.whole.seconds for session in self._sessions),
            synthesis_seconds=sum(session.synthesis.seconds for session in self._sessions),
            distillation_seconds=sum(session.distillation.seconds for session in self._sessions),
            images=self._images,
            attempted=self._attempted,
            devices=tuple(self._devices),
            student_images=self._student_images,
        )


class _Span:
    """The time from the first beginning to the last end."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._ended: float | None = None

    def begin(self, time: float) -> None:
        if self._began is None:
            self._began = time

    def end(self, time: float) -> None:
        self._ended = time

    @property
    def seconds(self) -> float:
        """Its length; 0 where it has not begun or not ended."""
        return 0.0 if self._began is None or self._ended is None else max(0.0, self._ended - self._began)


class _Session:
    """The spans of one session."""

    def __init__(self, began: float) -> None:
        self.whole, self.synthesis, self.distillation = _Span(), _Span(), _Span()
        self.whole.begin(began)


def finite(value: JSON) -> JSON:
    """The same data with null for NaN and infinity, which JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(inner) for inner in value]
    return value
