"""The synthesis worker as a Ray actor."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType

import ray

from raydfkd.config.recipe import Recipe
from raydfkd.devices import device_name, worker_device
from raydfkd.distributed.drain_notice import DrainNotice
from raydfkd.job import job_of
from raydfkd.networks.teacher import open_teacher
from raydfkd.synthesis.checkpoint import Interrupted
from raydfkd.synthesis.worker import SynthesisWorker
from raydfkd.units import UnitProgress, WorkUnit

MAX_NEWS = 1000
"""Words on a unit that are kept for a driver that does not ask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What came of an attempt at a unit."""

    record: bytes | None
    """Of the commit; None where the unit was left."""
    news: list[UnitProgress]
    """What was not asked for by then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The place of a worker that is ready."""

    node: str
    """Id of its node."""
    device: str
    """Name of its device."""


class SynthesisActor:
    """A worker in a process of its own; builds everything at the first call, so that a mistake reaches the driver.

    It leaves its unit, the state saved, when its node is drained, on SIGTERM, and when ``leave`` is called.

    Args:
        recipe: as JSON.
        made_of: what the job's images depend on.
    """

    def __init__(self, recipe: str, made_of: Mapping[str, object]) -> None:
        self._recipe = Recipe.model_validate_json(recipe)
        self._made_of = made_of
        self._worker: SynthesisWorker | None = None
        self._is_working = False
        self._news: list[UnitProgress] = []
        self._noting = threading.Lock()
        self._leaving = threading.Event()
        self._is_drained = DrainNotice()
        self._on_sigterm = signal.signal(signal.SIGTERM, self._leave_on_signal)

    def ready(self) -> Place:
        """Build the worker: teacher, objective, synthesizer."""
        runtime = self._recipe.runtime
        device = worker_device(runtime.device, runtime.gpus_per_worker)
        if self._worker is None:
            self._worker = SynthesisWorker(
                job_of(self._recipe, self._made_of),
                open_teacher(self._recipe),
                device=device,
                should_stop=self._should_stop,
                on_progress=self._note,
            )
        return Place(node=ray.get_runtime_context().get_node_id(), device=device_name(device))

    def run(self, unit: WorkUnit, attempt: int) -> Work:
        """Commit ``unit``; only the commit's record travels, never pixels."""
        self._is_working = True
        self._take_news()  # what is left of an attempt that failed would be taken for this one's
        try:
            if self._should_stop():
                return Work(record=None, news=[])
            self.ready()
            assert self._worker is not None
            record = self._worker.run(unit, attempt).to_json()
            return Work(record=record, news=self._take_news())
        except Interrupted:
            return Work(record=None, news=self._take_news())
        finally:
            self._is_working = False

    @ray.method(concurrency_group="control")
    def progress(self) -> list[UnitProgress]:
        """What is new since the last call: each look at the objective, and how far the unit is."""
        return self._take_news()

    def _take_news(self) -> list[UnitProgress]:
        with self._noting:
            news, self._news = self._news, []
        return news

    def _note(self, progress: UnitProgress) -> None:
        with self._noting:
            if self._news and not self._news[-1].objective:
                self._news.pop()  # only the latest word on how far it is matters
            self._news = [*self._news[-MAX_NEWS:], progress]

    @ray.method(concurrency_group="control")
    def leave(self) -> None:
        """Leave the unit in work at its next step; other units are not begun."""
        self._leaving.set()

    def _should_stop(self) -> bool:
        return self._leaving.is_set() or self._is_drained()

    def _leave_on_signal(self, number: int, frame: FrameType | None) -> None:
        self._leaving.set()
        if not self._is_working and callable(self._on_sigterm):
            self._on_sigterm(number, frame)
