"""Whether synthesis or training comes first where both do not fit, and what happens if one takes the other's room."""

from __future__ import annotations

import pytest


class Pool:
    is_at_work = False


class Training:
    """Notes what is asked of it."""

    def __init__(self) -> None:
        self.is_waiting = False
        self.asked: list[str] = []

    def begin(self) -> None:
        if self.asked[-1:] != ["begin"]:
            self.asked.append("begin")

    def pause(self) -> None:
        self.asked.append("pause")

    def look(self) -> None: ...


class Shared:
    """A ``Sharing`` whose clock the test turns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fits: bool) -> None:
        from raydfkd.distributed import sharing

        self.now = 0.0
        monkeypatch.setattr(sharing.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(sharing, "fits_at_once", lambda job: fits)
        self.pool, self.training, self.said = Pool(), Training(), list[str]()
        say = lambda topic, text: self.said.append(text)  # noqa: E731
        self._sharing = sharing.Sharing(None, self.pool, self.training, say)
        self._sharing.begin()

    def look(self, *, after_s: float) -> None:
        for _ in range(round(after_s)):
            self.now += 1.0
            self._sharing.look()


def test_training_begins_at_once_where_both_have_room(monkeypatch):
    shared = Shared(monkeypatch, fits=True)
    assert shared.training.asked == ["begin"]
    assert shared.said == []


def test_training_waits_for_a_worker_where_they_have_not(monkeypatch):
    shared = Shared(monkeypatch, fits=False)
    shared.look(after_s=600)
    assert shared.training.asked == []
    assert shared.said == ["there is no room for its training and for synthesis at once; the images come first"]
    shared.pool.is_at_work = True
    shared.look(after_s=1)
    assert shared.training.asked == ["begin"]


def test_training_that_waits_for_images_which_nobody_can_make_gives_its_room_back(monkeypatch):
    shared = Shared(monkeypatch, fits=True)
    shared.training.is_waiting = True
    shared.look(after_s=60)
    assert shared.training.asked == ["begin"]
    shared.look(after_s=1)
    assert shared.training.asked == ["begin", "pause"]
    shared.training.is_waiting = False
    shared.look(after_s=600)
    assert shared.training.asked == ["begin", "pause"]
    shared.pool.is_at_work = True
    shared.look(after_s=1)
    assert shared.training.asked == ["begin", "pause", "begin"]


def test_training_that_gets_on_keeps_its_room(monkeypatch):
    shared = Shared(monkeypatch, fits=True)
    shared.look(after_s=600)
    assert shared.training.asked == ["begin"]


def test_training_keeps_its_room_while_a_worker_makes_images(monkeypatch):
    shared = Shared(monkeypatch, fits=True)
    shared.training.is_waiting = shared.pool.is_at_work = True
    shared.look(after_s=600)
    assert shared.training.asked == ["begin"]
