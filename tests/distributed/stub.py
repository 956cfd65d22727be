"""A synthesis actor without torch, so that tests of the pool around it take seconds.

It commits nothing: it answers with the records that it was given, as if it had.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray

from raydfkd.store.errors import StoreError
from raydfkd.units import UnitProgress, WorkUnit


class StubActor:
    """Does what ``acts`` says.

    Args:
        records: the record of each unit's commit.
        acts: ``folder`` for the notes of all actors; ``seconds`` that a unit takes; ``builds``, how many actors can be
            built; ``hang_at``, the unit whose first attempt never ends; ``is_disk_full``.
    """

    def __init__(self, records: Mapping[str, bytes], acts: Mapping[str, Any]) -> None:
        self._records, self._acts = records, acts
        self._folder = Path(acts["folder"])
        self._step, self._unit = 0, ""

    def ready(self) -> SimpleNamespace:
        number = self._count("built")
        if number > self._acts.get("builds", 99):
            raise RuntimeError("CUDA error: unspecified launch failure")
        return SimpleNamespace(node=ray.get_runtime_context().get_node_id(), device="none")

    def run(self, unit: WorkUnit, attempt: int) -> SimpleNamespace:
        self._step, self._unit = 1, unit.id
        if self._acts.get("is_disk_full"):
            raise StoreError(
                f"/sets/a/parts/{unit.id}-{os.getpid()}.parquet cannot be written (No space left on device)"
            )
        if unit.id == self._acts.get("hang_at") and self._count("hung") == 1:
            (self._folder / "pid").write_text(str(os.getpid()))
            time.sleep(600)
        time.sleep(self._acts.get("seconds", 0.05))
        return SimpleNamespace(record=self._records[unit.id], news=[])

    def progress(self) -> list[UnitProgress]:
        return [UnitProgress(unit=self._unit, step=self._step, steps=2)] if self._unit else []

    def leave(self) -> None: ...

    def _count(self, what: str) -> int:
        """How often that has happened in all actors, this time included."""
        number = 1
        while True:
            try:
                (self._folder / f"{what}-{number}").touch(exist_ok=False)
                return number
            except FileExistsError:
                number += 1
