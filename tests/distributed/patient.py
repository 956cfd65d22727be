"""A synthesizer for trials of what dies: it takes time, but hardly any of a processor."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from raydfkd.data.batches import SyntheticBatch
from raydfkd.seeds import rng_from
from raydfkd.synthesis.checkpoint import NO_HOOK, StepHook
from raydfkd.synthesis.synthesizer import Log, Setting
from raydfkd.units import Request


class Patient:
    """Noise from the unit's seed.

    Args:
        steps: that a unit takes.
        pause: seconds between two of them.
    """

    def __init__(self, setting: Setting, *, steps: int = 20, pause: float = 0.0) -> None:
        self._shape = setting.space.shape
        self._steps, self._pause = steps, pause

    def num_steps(self, request: Request) -> int:
        return self._steps

    def produce(self, request: Request, log: Log, hook: StepHook = NO_HOOK) -> Iterator[SyntheticBatch]:
        saved = hook.resumed()
        for step in range(0 if saved is None else saved["step"], self._steps):
            hook(lambda step=step: {"step": step})
            time.sleep(self._pause)
        yield SyntheticBatch(
            images=torch.randint(0, 256, (request.count, *self._shape), generator=rng_from(request.seed)).byte(),
            labels=torch.tensor(request.classes).repeat_interleave(request.images_per_class),
            teacher_logits=torch.zeros(request.count, 10).half(),
            objective=1.0,
        )
