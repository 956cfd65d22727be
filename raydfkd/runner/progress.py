"""Live progress: what a run says while it works, on a terminal and elsewhere, and its metrics.jsonl."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from raydfkd.data.commits import Commit
from raydfkd.report.metrics import MetricsLog
from raydfkd.units import Failure

PLAIN_EVERY_S = 5.0
"""Seconds between lines where the output is not a terminal."""


class Monitor:
    """Receives what happens and shows it: bars on a terminal, a line every few seconds elsewhere."""

    def __init__(self, console: Console, metrics: MetricsLog) -> None:
        self._console = console
        self._metrics = metrics
        self._lock = threading.RLock()
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._last_plain = time.monotonic()
        self._planned_images = 0
        self._images_before = 0
        self._images = 0
        self._units_done = 0
        self._synthesis_began: float | None = None
        self._synthesis_ended: float | None = None
        self._student_steps = 0
        self._training = ""
        self._student_began: tuple[float, int] | None = None
        self._student_ended: float | None = None

    def __enter__(self) -> Monitor:
        """Start showing."""
        if self._console.is_terminal:
            columns = (TextColumn("{task.description:9}"), BarColumn(30), TextColumn("{task.fields[status]}"))
            self._bars = Progress(*columns, console=self._console, refresh_per_second=4)
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop showing."""
        if self._bars is not None:
            self._bars.stop()

    def say(self, topic: str, text: str) -> None:
        """One line that stays."""
        (self._bars.console if self._bars is not None else self._console).print(
            f"{topic:9} {text}", highlight=False, soft_wrap=True, markup=False
        )

    def planned(self, *, images: int, images_before: int, units_before: int, student_steps: int, training: str) -> None:
        """What is to be done and what earlier runs have done of it."""
        with self._lock:
            self._planned_images, self._images_before, self._images = images, images_before, images_before
            self._units_done = units_before
            self._student_steps = student_steps
            self._training = training

    def synthesis_started(self) -> None:
        """The first unit is about to be worked on."""
        with self._lock:
            self._synthesis_began = self._synthesis_began or time.monotonic()
            self._begin("synthesis", f"{self._images:,}/{self._planned_images:,} images   starting")

    def student_started(self) -> None:
        """Training is being set up, and will wait for images."""
        with self._lock:
            self._begin("student", "starting")

    def committed(self, commit: Commit, *, running: int) -> None:
        """A unit is done; ``running`` others are under way."""
        with self._lock:
            self._units_done += 1
            self._images += commit.images
            self._synthesis_ended = time.monotonic()
            self._metrics.write(
                "unit",
                unit=commit.unit,
                images=commit.images,
                seconds=round(commit.seconds, 3),
                objective=commit.objective,
                attempt=commit.attempt,
            )
            for entry in commit.curve:
                self._metrics.write("objective", unit=commit.unit, **entry)
            rate = self.images_per_second
            left = (self._planned_images - self._images) / rate if rate else 0.0
            status = (
                f"{self._images:,}/{self._planned_images:,} images   {rate:.1f}/s   "
                f"units {self._units_done} done {running} running   ETA {_clock(left)}"
            )
            self._show("synthesis", status, self._images, self._planned_images)

    def failed(self, failure: Failure, *, is_final: bool) -> None:
        """An attempt at a unit failed by itself."""
        with self._lock:
            self._metrics.write("failure", unit=failure.unit, attempt=failure.attempt, error=failure.error)
            outcome = "set aside" if is_final else "will be tried again"
            self.say("synthesis", f"unit {failure.unit} failed (attempt {failure.attempt}): {failure.error}; {outcome}")

    def lost(self, unit: str, reason: str) -> None:
        """A worker died under a unit."""
        self.say("synthesis", f"worker lost ({reason}); unit {unit} goes to another")

    def student(self, entry: Mapping[str, float]) -> None:
        """An entry of the learning curve."""
        with self._lock:
            now, step = time.monotonic(), int(entry["step"])
            self._student_began = self._student_began or (now, step - 1)
            self._student_ended = now
            self._metrics.write("student", training=self._training, **entry)
            began, first = self._student_began
            rate = (step - first) / max(now - began, 1e-9)
            left = (self._student_steps - step) / rate if step > first + 1 else 0.0
            status = (
                f"step {step:,}/{self._student_steps:,}   loss {entry['loss']:.3f}   agreement "
                f"{entry['agreement']:.0%}   of {int(entry['snapshot_images']):,} images   ETA {_clock(left)}"
            )
            self._show("student", status, step, self._student_steps, is_last=step == self._student_steps)

    @property
    def images_per_second(self) -> float:
        """Images that this run committed per second of synthesis."""
        seconds = self.synthesis_seconds
        return (self._images - self._images_before) / seconds if seconds > 0 else 0.0

    @property
    def synthesis_seconds(self) -> float:
        """From the first unit's start to the last commit."""
        if self._synthesis_began is None or self._synthesis_ended is None:
            return 0.0
        return self._synthesis_ended - self._synthesis_began

    @property
    def distillation_seconds(self) -> float:
        """From the first entry of the learning curve to the last."""
        if self._student_began is None or self._student_ended is None:
            return 0.0
        return self._student_ended - self._student_began[0]

    def _begin(self, topic: str, status: str) -> None:
        if self._bars is not None:
            self._show(topic, status, 0, 1)
        else:
            self.say(topic, status)

    def _show(self, topic: str, status: str, done: int, total: int, *, is_last: bool = False) -> None:
        if self._bars is not None:
            if topic not in self._tasks:
                self._tasks[topic] = self._bars.add_task(topic, total=total, status="")
            self._bars.update(self._tasks[topic], completed=done, total=total, status=status)
            return
        now = time.monotonic()
        if now - self._last_plain >= PLAIN_EVERY_S or is_last or done == total:
            self._last_plain = now
            self.say(topic, status)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
