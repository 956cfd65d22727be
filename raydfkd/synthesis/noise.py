"""Images of noise: what a synthesis has to beat, and the Gaussian scheme of calibration."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from raydfkd.config.schema import Positive, PositiveFloat
from raydfkd.data.batches import SyntheticBatch
from raydfkd.images.pixels import nominal_from_unit
from raydfkd.seeds import rng_from
from raydfkd.synthesis.checkpoint import NO_HOOK, StepHook
from raydfkd.synthesis.synthesizer import SYNTHESIZERS, Log, Setting
from raydfkd.units import Request


@SYNTHESIZERS.register("noise_images")
class NoiseImages:
    """Draws every pixel by itself and asks the teacher what it sees; nothing is optimised, so there is no objective.

    ``gaussian`` is centred on mid-grey, ``uniform`` goes from black to white. Labels are the teacher's answers, so
    classes are as frequent as it finds them. Source: the Gaussian scheme of Haroush et al. 2020 (The Knowledge Within),
    and the control of every benchmark.

    Args:
        distribution: gaussian or uniform.
        std: of the Gaussian, in nominal units: 1 is 0.225 of the range from black to white.
        batch_size: images that are made at a time.
    """

    is_optimised = False

    def __init__(
        self,
        setting: Setting,
        *,
        distribution: Literal["gaussian", "uniform"] = "gaussian",
        std: PositiveFloat = 1.0,
        batch_size: Positive = 100,
    ) -> None:
        if setting.targets.is_conditional:
            raise ValueError("noise has no class before the teacher sees it; use targets: none")
        self._setting = setting
        self._distribution, self._std, self._batch_size = distribution, std, batch_size

    def produce(self, request: Request, log: Log, hook: StepHook = NO_HOOK) -> Iterator[SyntheticBatch]:
        """Stream the images of ``request``."""
        saved = hook.resumed()
        made = 0 if saved is None else saved["made"]
        rng = rng_from(request.seed)
        for start in range(0, request.count, self._batch_size):
            images = self._draw(min(self._batch_size, request.count - start), rng)
            if start < made:
                continue  # drawn all the same, so that those after it are the same
            hook(partial(_state, start))
            yield self._setting.judge.keep(images.to(self._setting.device), None, 0.0)

    def num_steps(self, request: Request) -> int:
        """A step for each batch."""
        return -(-request.count // self._batch_size)

    def _draw(self, count: int, rng: torch.Generator) -> Tensor:
        shape = (count, *self._setting.space.shape)
        if self._distribution == "uniform":
            return nominal_from_unit(torch.rand(shape, generator=rng))
        return self._std * torch.randn(shape, generator=rng)


def _state(made: int) -> dict[str, Any]:
    return {"made": made}
