"""Events of a run, and the listeners that are told of them: the metrics file, the terminal, any other."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from raydfkd.data.commits import Commit
from raydfkd.report.metrics import MetricsLog
from raydfkd.report.redaction import redacted
from raydfkd.units import Failure, UnitProgress

PROGRESS_EVERY_S = 4.0
"""Seconds between entries on a unit's progress in the metrics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The work of a session, and the part of it that earlier sessions have done."""

    job: str
    """Digest of the images."""
    training: str
    """Digest of the student's training."""
    images: int
    units: int
    images_before: int
    units_before: int
    student_steps: int


class Listener:
    """Is told what happens in a run; by default nothing comes of it."""

    def say(self, topic: str, text: str) -> None:
        """A line for people has come, which stays on the terminal."""

    def planned(self, plan: Plan) -> None:
        """A session begins."""

    def synthesis_started(self) -> None:
        """The first unit is about to be worked on."""

    def worker_ready(self, device: str) -> None:
        """A worker is about to make images on the device of that name."""

    def progressed(self, progress: UnitProgress) -> None:
        """A unit in work has come so far."""

    def committed(self, commit: Commit, *, running: int) -> None:
        """A unit is done; ``running`` others are under way."""

    def failed(self, failure: Failure, *, is_final: bool) -> None:
        """An attempt at a unit failed by itself."""

    def lost(self, unit: str, reason: str) -> None:
        """A worker went away under a unit."""

    def student_started(self) -> None:
        """Training is being set up, and will wait for images."""

    def student(self, entry: Mapping[str, float]) -> None:
        """An entry of the learning curve."""


class Events(Listener):
    """Tells every listener, one event after another, from whatever thread."""

    def __init__(self, *listeners: Listener) -> None:
        self._listeners = listeners
        self._lock = threading.RLock()

    def _tell(self, act: str, *what: Any, **more: Any) -> None:
        with self._lock:
            for listener in self._listeners:
                getattr(listener, act)(*what, **more)

    @override
    def say(self, topic: str, text: str) -> None:
        self._tell("say", topic, redacted(text))

    @override
    def planned(self, plan: Plan) -> None:
        self._tell("planned", plan)

    @override
    def synthesis_started(self) -> None:
        self._tell("synthesis_started")

    @override
    def worker_ready(self, device: str) -> None:
        self._tell("worker_ready", device)

    @override
    def progressed(self, progress: UnitProgress) -> None:
        self._tell("progressed", progress)

    @override
    def committed(self, commit: Commit, *, running: int) -> None:
        self._tell("committed", commit, running=running)

    @override
    def failed(self, failure: Failure, *, is_final: bool) -> None:
        self._tell("failed", failure, is_final=is_final)

    @override
    def lost(self, unit: str, reason: str) -> None:
        self._tell("lost", unit, reason)

    @override
    def student_started(self) -> None:
        self._tell("student_started")

    @override
    def student(self, entry: Mapping[str, float]) -> None:
        self._tell("student", entry)


class MetricsWriter(Listener):
    """Writes all events that count or are drawn to ``metrics.jsonl``; ``report.metrics.RunStats`` reads it again."""

    def __init__(self, log: MetricsLog) -> None:
        self._log = log
        self._training = ""
        self._last: dict[str, float] = {}

    @override
    def planned(self, plan: Plan) -> None:
        self._training = plan.training
        self._log.write(
            "session",
            job=plan.job,
            training=plan.training,
            images=plan.images,
            images_before=plan.images_before,
            units_before=plan.units_before,
        )

    @override
    def synthesis_started(self) -> None:
        self._log.write("synthesis")

    @override
    def worker_ready(self, device: str) -> None:
        self._log.write("worker", device=device)

    @override
    def progressed(self, progress: UnitProgress) -> None:
        if progress.objective:
            self._log.write("objective", unit=progress.unit, **progress.objective)
        now = time.monotonic()
        if now - self._last.get(progress.unit, 0.0) >= PROGRESS_EVERY_S:
            self._last[progress.unit] = now
            self._log.write("progress", unit=progress.unit, step=progress.step, steps=progress.steps)

    @override
    def committed(self, commit: Commit, *, running: int) -> None:
        self._log.write(
            "unit",
            unit=commit.unit,
            images=commit.images,
            seconds=round(commit.seconds, 3),
            objective=commit.objective,
            attempt=commit.attempt,
        )

    @override
    def failed(self, failure: Failure, *, is_final: bool) -> None:
        self._log.write("failure", unit=failure.unit, attempt=failure.attempt, error=failure.error, final=is_final)

    @override
    def lost(self, unit: str, reason: str) -> None:
        self._log.write("lost", unit=unit, reason=reason)

    @override
    def student_started(self) -> None:
        self._log.write("training")

    @override
    def student(self, entry: Mapping[str, float]) -> None:
        self._log.write("student", training=self._training, **entry)
