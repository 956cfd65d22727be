"""The synthesis worker as a Ray actor."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import ray

from raydfkd.config.recipe import Recipe
from raydfkd.devices import pick_device
from raydfkd.distributed.drain_notice import DrainNotice
from raydfkd.job import transfer_set_of
from raydfkd.synthesis.checkpoint import Interrupted
from raydfkd.synthesis.worker import SynthesisWorker
from raydfkd.units import WorkUnit


class SynthesisActor:
    """A worker in a process of its own; builds everything at the first call, so that a mistake reaches the driver.

    It leaves its unit, the state saved, when its node is drained, on SIGTERM, and when ``leave`` is called.

    Args:
        recipe: as JSON.
        digest: of the recipe and its teacher's weights.
    """

    def __init__(self, recipe: str, digest: str) -> None:
        self._recipe = Recipe.model_validate_json(recipe)
        self._digest = digest
        self._worker: SynthesisWorker | None = None
        self._is_working = False
        self._leaving = threading.Event()
        self._is_drained = DrainNotice()
        self._on_sigterm = signal.signal(signal.SIGTERM, self._leave_on_signal)

    def ready(self) -> None:
        """Build the worker: teacher, objective, synthesizer."""
        if self._worker is None:
            transfer_set = transfer_set_of(self._recipe, self._digest)
            self._worker = SynthesisWorker(
                self._recipe,
                transfer_set,
                device=pick_device(self._recipe.runtime.device),
                should_stop=self._should_stop,
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
