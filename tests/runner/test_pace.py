"""How long a step takes on a machine on which other things run too."""

from __future__ import annotations

import torch

from raydfkd.runner import pace


def timed(monkeypatch, seconds):
    """The time of a step that takes so many seconds, one after the other; and how often it was made."""
    clock, made = [0.0], []
    monkeypatch.setattr(pace.time, "perf_counter", lambda: clock[0])

    def work():
        made.append(None)
        clock[0] += seconds[len(made) - 1]

    return pace._second_time(work, torch.device("cpu")), len(made)


def test_step_takes_as_long_as_the_fastest_did_once_all_is_warm(monkeypatch):
    assert timed(monkeypatch, [0.0625, 0.5, 0.25, 0.75, 0.25, 0.125]) == (0.125, 6)


def test_slow_step_is_not_made_again(monkeypatch):
    assert timed(monkeypatch, [9.0, 3.0]) == (3.0, 2)
