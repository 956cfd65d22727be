"""The synthesis worker as a Ray actor."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import ray

from raydfkd.devices import pick_device
from raydfkd.distill.published import PublishedStudents
from raydfkd.distributed.drain import DrainNotice
from raydfkd.distributed.student_feed import AnnouncedStudents
from raydfkd.job import transfer_set_of
from raydfkd.recipe import Recipe
from raydfkd.schedule import WorkUnit
from raydfkd.synthesis.interlude import Interrupted
from raydfkd.synthesis.worker import SynthesisWorker


class SynthesisActor:
    """A worker in a process of its own; builds everything at the first call, so that a mistake reaches the driver.

    It leaves its unit, the state saved, when its node is drained, on SIGTERM, and when ``leave`` is called.

    Args:
        recipe: as JSON.
        digest: of the recipe and its teacher's weights.
        board: to which the training pins versions of the student; None where no training runs beside the synthesis.
    """

    def __init__(self, recipe: str, digest: str, board: Any) -> None:
        self._recipe = Recipe.model_validate_json(recipe)
        self._digest = digest
        self._board = board
        self._worker: SynthesisWorker | None = None
        self._is_working = False
        self._leaving = threading.Event()
        self._is_drained = DrainNotice()
        self._on_sigterm = signal.signal(signal.SIGTERM, self._leave_on_signal)

    def ready(self) -> None:
        """Build the worker: teacher, objective, synthesizer."""
        if self._worker is None:
            transfer_set = transfer_set_of(self._recipe, self._digest)
            stored = PublishedStudents(transfer_set.store).newest
            self._worker = SynthesisWorker(
                self._recipe,
                transfer_set,
                device=pick_device(self._recipe.runtime.device),
                should_stop=self._should_stop,
                newest_student=stored if self._board is None else AnnouncedStudents(self._board, stored),
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
    def leave(self) -> None:
        """Leave the unit in work at its next step; other units are not begun."""
        self._leaving.set()

    def _should_stop(self) -> bool:
        return self._leaving.is_set() or self._is_drained()

    def _leave_on_signal(self, number: int, frame: FrameType | None) -> None:
        self._leaving.set()
        if not self._is_working and callable(self._on_sigterm):
            self._on_sigterm(number, frame)
