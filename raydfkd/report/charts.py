"""Curves of a run's metrics, laid out for inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any
from zlib import crc32

import numpy as np

MAX_POINTS = 200
MAX_ENTRIES = 50_000
"""Entries of a kind that are kept in memory: about 800 units of 62 looks at the objective each."""
_BESIDE = frozenset({"event", "time", "unit", "step", "attempt"})
"""Keys of an entry on the objective that are no part of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A curve over steps, ready to draw in a box of ``SIZE`` whose origin is the upper left corner."""

    title: str
    first: str
    last: str
    log: bool
    line: str
    band: str
    end: tuple[float, float]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One pair of classes in a heat map."""

    row: int
    column: int
    share: float
    """Of the row, from 0 to 1."""
    is_right: bool
    title: str
    """What it says when it is pointed at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """A confusion matrix, a row for each class, ready to draw in cells of one unit."""

    size: int
    """Classes."""
    names: list[str]
    """Of the classes, for the margin; none where there are too many to read."""
    cells: list[Cell]
    """Those that are not empty."""


MAX_NAMED = 30
"""Classes up to which those of a heat map are named in its margin."""


def heat_map(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> HeatMap:
    """Lay out counts [K][K] as shares of their rows."""
    cells = []
    for row, counts in enumerate(matrix):
        total = sum(counts)
        cells += [
            Cell(
                row=row,
                column=column,
                share=number / total,
                is_right=row == column,
                title=f"{names[row]} taken for {names[column]}: {number:,} of {total:,}"
                if row != column
                else f"{names[row]}: {number:,} of {total:,} right",
            )
            for column, number in enumerate(counts)
            if number
        ]
    return HeatMap(size=len(matrix), names=list(names) if len(names) <= MAX_NAMED else [], cells=cells)


_STUDENT = ("loss", "agreement", "snapshot_images")
"""Keys of an entry of the learning curve that are drawn."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 42.0, 310.0, 8.0, 138.0


class Curves:
    """The curves of a run, thinned while its metrics are read, so that memory does not grow with the run.

    Up to ``MAX_ENTRIES`` entries of each kind are exact. Of more, the student's curve keeps every second step, then
    every fourth, and so on, and the objective that of some units, whole ones and the same in whatever order they come.

    Args:
        training: name of the student's training; any, unless given.
    """

    def __init__(self, training: str | None = None) -> None:
        self._training = training
        self._student: dict[int, list[float | None]] = {}
        self._units: dict[str, dict[int, dict[str, float]]] = {}
        self._places: list[tuple[int, str]] = []
        self._num_entries = 0
        self._limit = 1 << 32

    def add(self, event: Mapping[str, Any]) -> None:
        """Take the next event into account."""
        kind, step = event["event"], event.get("step")
        if kind == "objective" and step is not None:
            self._add_objective(event.get("unit", ""), step, event)
        elif kind == "student" and step is not None and self._training in (None, event.get("training")):
            # a student that resumes from a checkpoint repeats steps: the last entry on a step counts
            self._student[step] = [event.get(key) for key in _STUDENT]
            if len(self._student) > MAX_ENTRIES:
                steps = sorted(self._student)
                self._student = {step: self._student[step] for step in (*steps[:-1:2], steps[-1])}

    def _add_objective(self, unit: str, step: int, event: Mapping[str, Any]) -> None:
        entries = self._units.get(unit)
        if entries is None:
            place = crc32(unit.encode())  # has nothing to do with a unit's classes, nor with when it was made
            if place >= self._limit:
                return
            entries = self._units[unit] = {}
            heappush(self._places, (-place, unit))
        self._num_entries += step not in entries
        entries[step] = {key: value for key, value in event.items() if key not in _BESIDE and value is not None}
        while self._num_entries > MAX_ENTRIES and len(self._units) > 1:
            place, last = heappop(self._places)
            self._limit = -place
            self._num_entries -= len(self._units.pop(last))

    def student(self) -> list[Chart]:
        """Loss, agreement and size of the snapshot over the student's steps."""
        steps = _thin(sorted(self._student))
        charts = []
        titles = ("loss", "agreement with teacher", "images that it draws from")
        forms = (_short, lambda value: f"{100 * value:.3g} %", _short)
        for number, (title, form) in enumerate(zip(titles, forms, strict=True)):
            values = [(step, self._student[step][number]) for step in steps]
            charts += _chart(title, [(step, value, value, value) for step, value in values if value is not None], form)
        return charts

    def objective(self) -> list[Chart]:
        """Every part of the objective over the steps of a unit: median over units, and the middle half."""
        by_step: dict[int, list[Mapping[str, float]]] = {}
        for entries in self._units.values():
            for step, values in entries.items():
                by_step.setdefault(step, []).append(values)
        steps = _thin(sorted(by_step))
        keys = dict.fromkeys(key for step in steps for values in by_step[step] for key in values)
        charts = []
        for key in keys:
            points = []
            for step in steps:
                found = [values[key] for values in by_step[step] if key in values]
                if found:
                    low, middle, high = np.percentile(found, (25, 50, 75)).tolist()
                    points.append((step, low, middle, high))
            charts += _chart(key, points, _short)
        return charts


def _chart(title: str, points: Sequence[tuple[int, float, float, float]], form: Callable[[float], str]) -> list[Chart]:
    """The curve of (step, low, middle, high), or nothing where there are no points."""
    if not points:
        return []
    low, high = min(point[1] for point in points), max(point[3] for point in points)
    log = low > 0 and high / low >= 100
    place_x, x_ticks = _axis(points[0][0], points[-1][0], _LEFT, _RIGHT, log=False, tight=True)
    place_y, y_ticks = _axis(low, high, _BOTTOM, _TOP, log=log, tight=False)
    line = [(place_x(step), place_y(middle)) for step, _, middle, _ in points]
    above = [(place_x(step), place_y(upper)) for step, _, _, upper in points]
    below = [(place_x(step), place_y(lower)) for step, lower, _, _ in reversed(points)]
    chart = Chart(
        title=title,
        first=form(points[0][2]),
        last=form(points[-1][2]),
        log=log,
        line=_coordinates(line),
        band="" if above == below[::-1] else _coordinates(above + below),
        end=line[-1],
        x_ticks=[(place_x(tick), _short(tick)) for tick in x_ticks],
        y_ticks=[(place_y(tick), form(tick)) for tick in y_ticks],
    )
    return [chart]


def _axis(
    low: float, high: float, start: float, end: float, *, log: bool, tight: bool
) -> tuple[Callable[[float], float], list[float]]:
    """A function to a place from ``start`` to ``end``, and round values to mark; a tight axis ends with the data."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        first, last = decades[0], decades[-1]
        marked = decades[:: math.ceil(len(decades) / 5)]
        return lambda value: start + (end - start) * (math.log10(value) - first) / (last - first), [
            10.0**decade for decade in marked
        ]
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    magnitude = 10 ** math.floor(math.log10((high - low) / 4))
    step = magnitude * next(factor for factor in (1, 2, 5, 10) if magnitude * factor >= (high - low) / 4)
    ticks = [index * step for index in range(math.floor(low / step), math.ceil(high / step) + 1)]
    if tight:
        ticks = [tick for tick in ticks if low <= tick <= high]
    else:
        low, high = ticks[0], ticks[-1]
    return lambda value: start + (end - start) * (value - low) / (high - low), ticks


def _thin(steps: list[int]) -> list[int]:
    """Some of the steps, the first and the last included, at most ``MAX_POINTS``: more cannot be seen."""
    indices = np.linspace(0, len(steps) - 1, min(len(steps), MAX_POINTS)).round().astype(int)
    return [steps[index] for index in indices]


def _coordinates(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
