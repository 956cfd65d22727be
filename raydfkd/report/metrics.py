"""The metrics of a run as it goes: one JSON object a line."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

JSON: TypeAlias = "None | bool | int | float | str | Sequence[JSON] | Mapping[str, JSON]"


class MetricsLog:
    """``metrics.jsonl`` of a run: one JSON object a line, only ever appended to.

    Any thread may write, and a line is out of this process when ``write`` returns. Non-finite numbers become null, so
    that every line is JSON for every reader.
    """

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self._path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb" if fresh else "a+b") as file:
            if not fresh:
                file.seek(0)
                written = file.read()
                whole = written.rfind(b"\n") + 1
                if whole < len(written):  # the next line must not continue a torn one
                    file.truncate(whole)

    def write(self, event: str, **values: JSON) -> None:
        """Append one event with the time in seconds since the epoch."""
        line = json.dumps(finite({"event": event, "time": time.time(), **values}), allow_nan=False) + "\n"
        with self._lock, self._path.open("a", encoding="ascii") as file:
            file.write(line)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every event of a metrics file, without the last line where a killed process left it torn."""
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


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

    @property
    def images_per_second(self) -> float:
        """Images per second of synthesis; 0 where none were made."""
        return self.images / self.synthesis_seconds if self.synthesis_seconds else 0.0


def run_stats(metrics: Sequence[Mapping[str, Any]], *, job: str, training: str) -> RunStats:
    """Add up the sessions that worked on ``job``; of their students those of ``training``, both digests."""
    sessions: list[list[Mapping[str, Any]]] = []
    for event in metrics:
        if event["event"] == "session":
            sessions.append([event])
        elif sessions:
            sessions[-1].append(event)
    mine = [session for session in sessions if session[0]["job"] == job]
    units = [event for session in mine for event in session if event["event"] == "unit"]
    attempts = [event for session in mine for event in session if event["event"] in ("unit", "failure", "lost")]
    return RunStats(
        seconds=sum(_done(session)[-1]["time"] - session[0]["time"] for session in mine),
        synthesis_seconds=sum(_span(session, "synthesis", "unit") for session in mine),
        distillation_seconds=sum(
            _span([event for event in session if event.get("training", training) == training], "student", "student")
            for session in mine
        ),
        images=sum(event["images"] for event in units),
        attempted=len(attempts),
        devices=tuple(dict.fromkeys(e["device"] for session in mine for e in session if e["event"] == "worker")),
    )


def _done(session: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The session without events that only announce a beginning: all the work may turn out to be done."""
    return [event for event in session if event["event"] not in ("synthesis", "training")]


def _span(session: Sequence[Mapping[str, Any]], first: str, last: str) -> float:
    """Seconds from the first event of one kind to the last of another."""
    begins = [event["time"] for event in session if event["event"] == first]
    ends = [event["time"] for event in session if event["event"] == last]
    return float(max(0.0, ends[-1] - begins[0])) if begins and ends else 0.0


def finite(value: JSON) -> JSON:
    """The same data with null for NaN and infinity, which JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(inner) for inner in value]
    return value
