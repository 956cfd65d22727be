"""What a display of a run does, whoever looks at it."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from raydfkd.data.commits import Commit
from raydfkd.runner import progress
from raydfkd.runner.events import Plan
from raydfkd.runner.progress import Display
from raydfkd.units import UnitProgress

UNITS = 1000


class Shown(Display):
    """Counts the times that all units in work are looked at."""

    def __init__(self, console):
        super().__init__(console)
        self.looks = 0

    def _show(self, name, status, *, is_due):
        self.looks += 1
        super()._show(name, status, is_due=is_due)


@pytest.fixture
def clock(monkeypatch):
    found = SimpleNamespace(now=0.0, monotonic=lambda: found.now)
    monkeypatch.setattr(progress, "time", found)
    return found


@pytest.fixture
def shown(clock):
    display = Shown(Console(file=io.StringIO(), width=200))
    display.planned(Plan(job="a", training="b", images=10 * UNITS, units=UNITS, images_before=0, units_before=0,
                         student_steps=1))  # fmt: skip
    return display


def commit_of(unit):
    return Commit(unit=unit, attempt=1, seed=0, images=10, parts=(), content="0" * 32, objective=0.0,
                  student_version=-1, seconds=0.1)  # fmt: skip


def test_a_thousand_units_in_work_are_looked_at_four_times_a_second(shown, clock):
    for second in range(10):
        for number in range(UNITS):
            clock.now = second + number / UNITS
            shown.progressed(UnitProgress(unit=f"u{number:04}", step=second, steps=10))
    assert 10 * 3 <= shown.looks <= 10 * 4 + 1


def test_end_of_a_synthesis_is_shown_however_soon_it_comes(shown):
    for number in range(UNITS):
        shown.committed(commit_of(f"u{number:04}"), running=0)
    assert shown.looks == 2
    assert "10,000/10,000 images" in shown._console.file.getvalue()
    assert f"units {UNITS} done 0 running" in shown._console.file.getvalue()
