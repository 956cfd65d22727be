"""Rows of a benchmark, as a table for people and as JSON lines for scripts."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement; a field that does not apply is None and left out."""

    case: str
    device: str
    steps_per_s: float | None = None
    rows_per_s: float | None = None
    ratio_published: float | None = None
    """Our speed over that of the loop as published, median of alternating rounds."""
    ratio_raw: float | None = None
    """Our speed over that of the raw library, median of alternating rounds."""
    note: str = ""

    def to_json(self) -> str:
        """One object on one line."""
        return json.dumps({key: value for key, value in asdict(self).items() if value not in (None, "")})


def alternate(ours: Callable[[], int], theirs: Callable[[], int], *, rounds: int) -> tuple[float, float, float]:
    """Run both in turn, ``rounds`` times after one warm-up; each returns how many steps it made.

    Returns:
        Our median rate per second, theirs, and the median of the ratios pair by pair, which drift cannot bend.
    """
    ours(), theirs()
    pairs = [(_rate(ours), _rate(theirs)) for _ in range(rounds)]
    return (
        statistics.median(first for first, _ in pairs),
        statistics.median(second for _, second in pairs),
        statistics.median(first / second for first, second in pairs),
    )


def _rate(work: Callable[[], int]) -> float:
    started = time.perf_counter()
    return work() / (time.perf_counter() - started)


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text, columns that no row has left out."""
    columns = [key for key in asdict(rows[0]) if any(asdict(row)[key] not in (None, "") for row in rows)]
    cells = [columns, *([_cell(asdict(row)[key]) for key in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,.2f}" if isinstance(value, float) else str(value)
