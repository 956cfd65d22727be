"""Live progress for people: bars on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from typing_extensions import override

from raydfkd.data.commits import Commit
from raydfkd.runner.events import Listener, Plan
from raydfkd.units import Failure, UnitProgress

PLAIN_EVERY_S = 5.0
"""Seconds between lines of a topic where the output is not a terminal."""
LOOK_EVERY_S = 0.25
"""Seconds between looks at all units in work: from a thousand come hundreds of words a second on how far they are."""
SETTLED_S = 2.0
"""Seconds of work before a rate is trusted enough to say when it will be done."""


@dataclass(slots=True)
class _Topic:
    """Work whose progress is shown, such as the synthesis."""

    status: str
    done: float = 0.0
    """Share of the work that is done, from 0 to 1."""
    began: float = field(default_factory=time.monotonic)
    told: float = float("-inf")
    rate_from: tuple[float, float] | None = None
    """Time and share at which the work was first seen to move; what came before is not this session's rate."""

    def moved(self, done: float) -> None:
        self.done = done
        if self.rate_from is None:
            self.rate_from = (time.monotonic(), done)

    @property
    def eta(self) -> str:
        """The time when it will be done, if that can be said."""
        if self.rate_from is None or self.done >= 1:
            return ""
        began, first = self.rate_from
        elapsed = time.monotonic() - began
        if elapsed < SETTLED_S or self.done <= first:
            return ""
        return f"   ETA {_clock((1 - self.done) * elapsed / (self.done - first))}"


class Display(Listener):
    """Shows a run on a console; lines come also without news, so that a slow step can be told from a hang."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._topics: dict[str, _Topic] = {}
        self._plan: Plan | None = None
        self._images = self._units_done = self._running = 0
        self._in_work: dict[str, UnitProgress] = {}
        self._objective: float | None = None
        self._began_images = 0
        self._looked = float("-inf")
        self._lock = threading.RLock()
        self._is_over = threading.Event()

    def __enter__(self) -> Display:
        """Start showing."""
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description:9}"),
                BarColumn(24),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
            )
            self._bars = Progress(*columns, console=self._console, refresh_per_second=4)
            self._bars.start()
        else:
            threading.Thread(target=self._keep_telling, name="raydfkd-display", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop showing."""
        self._is_over.set()
        if self._bars is not None:
            self._bars.stop()

    @override
    def say(self, topic: str, text: str) -> None:
        console = self._bars.console if self._bars is not None else self._console
        console.print(f"{topic:9} {text}", highlight=False, soft_wrap=True, markup=False)

    @override
    def planned(self, plan: Plan) -> None:
        self._plan = plan
        self._images = self._began_images = plan.images_before
        self._units_done = plan.units_before

    @override
    def synthesis_started(self) -> None:
        self._begin("synthesis", f"{self._images:,}/{self._planned:,} images   starting")

    @override
    def progressed(self, progress: UnitProgress) -> None:
        self._in_work[progress.unit] = progress
        self._objective = progress.objective.get("total", self._objective)
        self._running = max(self._running, len(self._in_work))
        self._show_synthesis()

    @override
    def committed(self, commit: Commit, *, running: int) -> None:
        self._in_work.pop(commit.unit, None)
        self._images += commit.images
        self._units_done += 1
        self._running = running
        self._show_synthesis()

    @override
    def failed(self, failure: Failure, *, is_final: bool) -> None:
        self._in_work.pop(failure.unit, None)
        outcome = "given up" if is_final else "will be tried again"
        self.say("synthesis", f"unit {failure.unit} failed (attempt {failure.attempt}): {failure.error}; {outcome}")

    @override
    def lost(self, unit: str, reason: str) -> None:
        self._in_work.pop(unit, None)
        self.say("synthesis", f"worker lost ({reason}); unit {unit} goes to another")

    @override
    def student_started(self) -> None:
        self._begin("student", "starting")

    @override
    def student(self, entry: Mapping[str, float]) -> None:
        step, steps = int(entry["step"]), self._plan.student_steps if self._plan is not None else 1
        topic = self._topic("student")
        topic.moved(step / steps)
        status = (
            f"step {step:,}/{steps:,}   loss {entry['loss']:.3f}   agreement {entry['agreement']:.0%}   "
            f"of {int(entry['snapshot_images']):,} images"
        )
        self._show("student", status, is_due=step == steps)

    @property
    def _planned(self) -> int:
        return self._plan.images if self._plan is not None else 0

    def _show_synthesis(self) -> None:
        topic, planned = self._topic("synthesis"), max(1, self._planned)
        is_over = self._images >= planned
        if time.monotonic() - self._looked < LOOK_EVERY_S and not is_over:
            return
        self._looked = time.monotonic()
        per_unit = planned / max(1, self._plan.units) if self._plan is not None else 0.0
        begun = sum(per_unit * unit.share for unit in self._in_work.values())
        topic.moved(min(1.0, (self._images + begun) / planned))
        rate = (self._images - self._began_images) / max(1e-9, time.monotonic() - topic.began)
        status = (
            f"{self._images:,}/{self._planned:,} images   {rate:.1f}/s   units {self._units_done} done "
            f"{self._running} running"
        )
        if self._in_work:
            least = min(self._in_work.values(), key=lambda unit: unit.share)
            status += f"   step {least.step:,}" + (f"/{least.steps:,}" if least.steps else "")
        if self._objective is not None:
            status += f"   objective {self._objective:.3g}"
        self._show("synthesis", status, is_due=is_over)

    def _topic(self, name: str) -> _Topic:
        with self._lock:
            return self._topics.setdefault(name, _Topic("starting"))

    def _begin(self, name: str, status: str) -> None:
        with self._lock:
            self._topics[name] = _Topic(status)
        self._show(name, status, is_due=True)

    def _show(self, name: str, status: str, *, is_due: bool) -> None:
        topic = self._topic(name)
        topic.status = status
        if self._bars is not None:
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=1.0, status="")
            self._bars.update(self._tasks[name], completed=topic.done, status=status + topic.eta)
        elif is_due or time.monotonic() - topic.told >= PLAIN_EVERY_S:
            self._tell(name, topic)

    def _tell(self, name: str, topic: _Topic) -> None:
        topic.told = time.monotonic()
        self.say(name, topic.status + topic.eta)

    def _keep_telling(self) -> None:
        """Write lines also where nothing has moved, with the time that the work has taken."""
        while not self._is_over.wait(PLAIN_EVERY_S / 5):
            with self._lock:
                silent = [
                    (name, topic)
                    for name, topic in self._topics.items()
                    if topic.done < 1 and time.monotonic() - topic.told >= PLAIN_EVERY_S
                ]
            for name, topic in silent:
                topic.told = time.monotonic()
                self.say(name, f"{topic.status}{topic.eta}   {_clock(topic.told - topic.began)} so far")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
