"""Rows of a benchmark, as a table for people and as JSON lines for scripts."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A figure that every round has one of."""

    median: float
    low: float
    """The least."""
    high: float
    """The greatest."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of the rounds' values."""
        return cls(median=statistics.median(values), low=min(values), high=max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement; a field that does not apply is None and left out.

    A ratio is our speed over another's in alternating rounds, pair by pair, which drift cannot bend.
    """

    case: str
    device: str
    steps_per_s: float | None = None
    rows_per_s: float | None = None
    ratio_published: Spread | None = None
    """Ratio to the loop as published."""
    ratio_fair: Spread | None = None
    """Ratio to the same loop without the costs that are free to avoid."""
    share_of_ceiling: float | None = None
    """The least time that this device could need for our step, over the time that it took; see ``ceilings``."""
    idle_share: Spread | None = None
    """Share of its time that the device waits."""
    ratio_raw: Spread | None = None
    """Ratio to the raw library."""
    seconds: float | None = None
    """Duration of something that is done once."""
    requests: int | None = None
    """Requests to an object store that it took."""
    bytes: int | None = None
    """Size of what came of it."""
    note: str = ""

    def to_json(self, **about: str) -> str:
        """A JSON object on one line, with ``about`` in it; a spread is its median, its extremes are ``..._range``."""
        plain: dict[str, object] = {**about}
        for key, value in self.shown().items():
            if isinstance(value, Spread):
                plain |= {key: round(value.median, 4), f"{key}_range": [round(value.low, 4), round(value.high, 4)]}
            else:
                plain[key] = value
        return json.dumps(plain)

    def shown(self) -> dict[str, object]:
        """The fields that apply."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: value for key, value in values.items() if value not in (None, "")}


def alternate(ours: Callable[[], int], theirs: Callable[[], int], *, rounds: int) -> tuple[float, Spread]:
    """Run both alternately, ``rounds`` times after one warm-up; each returns how many steps it made.

    Returns:
        Our median rate per second, and our ratio to theirs.
    """
    speed, [ratio] = alternate_all(ours, [theirs], rounds=rounds)
    return speed, ratio


def alternate_all(
    ours: Callable[[], int], theirs: Sequence[Callable[[], int]], *, rounds: int
) -> tuple[float, list[Spread]]:
    """Do as ``alternate`` with several others: our median rate per second, and our ratio to each of them."""
    works = [ours, *theirs]
    for work in works:
        work()
    rates = [[_rate(work) for work in works] for _ in range(rounds)]
    ratios = [Spread.of([rate[0] / rate[index] for rate in rates]) for index in range(1, len(works))]
    return statistics.median(rate[0] for rate in rates), ratios


def _rate(work: Callable[[], int]) -> float:
    started = time.perf_counter()
    return work() / (time.perf_counter() - started)


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text, columns that no row has left out."""
    columns = [field.name for field in fields(Row) if any(field.name in row.shown() for row in rows)]
    cells = [columns, *([_cell(row.shown().get(key)) for key in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,.2f}" if isinstance(value, float) else str(value)
