"""The metrics of a run as it goes: one JSON object a line."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Mapping, Sequence
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


def finite(value: JSON) -> JSON:
    """The same data with null for NaN and infinity, which JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(inner) for inner in value]
    return value
