"""The synthesis worker as a Ray actor."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from types import FrameType

import ray

from raydfkd.config.recipe import Recipe
from raydfkd.devices import pick_device
from raydfkd.distributed.drain_notice import DrainNotice
from raydfkd.job import job_of
from raydfkd.networks.teacher import open_teacher
from raydfkd.synthesis.checkpoint import Interrupted
from raydfkd.synthesis.worker import SynthesisWorker
from raydfkd.units import UnitProgress, WorkUnit

MAX_NEWS = 1000
"""Words on a unit that are kept for a driver that does not ask."""


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
        self._leaving = threading.Event()
        self._is_drained = DrainNotice()
        self._on_sigterm = signal.signal(signal.SIGTERM, self._leave_on_signal)

    def ready(self) -> None:
        """Build the worker: teacher, objective, synthesizer."""
        if self._worker is None:
            self._worker = SynthesisWorker(
                job_of(self._recipe, self._made_of),
                open_teacher(self._recipe),
                device=pick_device(self._recipe.runtime.device),
                should_stop=self._should_stop,
                on_progress=self._note,
            )

    def run(self, unit: WorkUnit, attempt: int) -> bytes | None:
        """Commit ``unit``; only the commit's record travels, never pixels. None where the unit was left."""
        self._is_working = True
        try:
            if self._should_stop():
                return None
            self.ready()
            assert self._worker is not None
            return self._worker.run(unit, attempt).to_json()
        except Interrupted:
            return None
        finally:
            self._is_working = False

    @ray.method(concurrency_group="control")
    def progress(self) -> list[UnitProgress]:
        """What is new since the last call: each look at the objective, and how far the unit is."""
        news, self._news = self._news, []
        return news

    def _note(self, progress: UnitProgress) -> None:
        if self._news and not self._news[-1].objective:
            self._news = self._news[:-1]  # only the latest word on how far it is matters
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
