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
    ratio_fair: float | None = None
    """Our speed over that of the same loop without what costs nothing to avoid, likewise."""
    share_of_ceiling: float | None = None
    """The least time that this device could need for our step, over the time that it took; see ``ceilings``."""
    idle_share: float | None = None
    """Share of its time that the device waits."""
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
    speed, [(their_speed, ratio)] = alternate_all(ours, [theirs], rounds=rounds)
    return speed, their_speed, ratio


def alternate_all(
    ours: Callable[[], int], theirs: Sequence[Callable[[], int]], *, rounds: int
) -> tuple[float, list[tuple[float, float]]]:
    """As ``alternate`` with several others.

    Returns:
        Our median rate per second, then for each of the others its own and the median ratio of ours to it.
    """
    works = [ours, *theirs]
    for work in works:
        work()
    rates = [[_rate(work) for work in works] for _ in range(rounds)]
    others = [
        (
            statistics.median(rate[index] for rate in rates),
            statistics.median(rate[0] / rate[index] for rate in rates),
        )
        for index in range(1, len(works))
    ]
    return statistics.median(rate[0] for rate in rates), others


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
