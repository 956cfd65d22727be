"""Images that are drawn and shown to the teacher as they are: noise, and models of pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from raydfkd.config.schema import Fraction, Positive, PositiveFloat
from raydfkd.data.batches import SyntheticBatch
from raydfkd.images.pixels import nominal_from_unit
from raydfkd.images.procedural import MODELS, Model, draw, plain_grounds
from raydfkd.seeds import rng_from
from raydfkd.synthesis.checkpoint import NO_HOOK, StepHook
from raydfkd.synthesis.synthesizer import SYNTHESIZERS, Log, Setting
from raydfkd.units import Request

BATCH = 100
"""Images that are made at a time unless a recipe says how many."""


class DrawnImages(ABC):
    """Draws images and asks the teacher what it sees; nothing is optimised, so there is no objective.

    Labels are the teacher's answers, so classes are as frequent as it finds them.
    """

    is_optimised = False

    def __init__(self, setting: Setting, batch_size: int) -> None:
        if setting.targets.is_conditional:
            raise ValueError("what is drawn has no class before the teacher sees it; use targets: none")
        self._setting, self._batch_size = setting, batch_size

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

    @abstractmethod
    def _draw(self, count: int, rng: torch.Generator) -> Tensor:
        """Nominal images [count, C, H, W]."""


@SYNTHESIZERS.register("noise_images")
class NoiseImages(DrawnImages):
    """Draws every pixel by itself and asks the teacher what it sees; nothing is optimised, so there is no objective.

    ``gaussian`` is centred on mid-grey, ``uniform`` goes from black to white. Labels are the teacher's answers, so
    classes are as frequent as it finds them. Source: the Gaussian scheme of Haroush et al. 2020 (The Knowledge Within),
    and the control of every benchmark.

    Args:
        distribution: gaussian or uniform.
        std: of the Gaussian, in nominal units: 1 is 0.225 of the range from black to white.
        batch_size: images that are made at a time.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        distribution: Literal["gaussian", "uniform"] = "gaussian",
        std: PositiveFloat = 1.0,
        batch_size: Positive = BATCH,
    ) -> None:
        super().__init__(setting, batch_size)
        self._distribution, self._std = distribution, std

    def _draw(self, count: int, rng: torch.Generator) -> Tensor:
        shape = (count, *self._setting.space.shape)
        if self._distribution == "uniform":
            return nominal_from_unit(torch.rand(shape, generator=rng))
        return self._std * torch.randn(shape, generator=rng)


@SYNTHESIZERS.register("procedural_images")
class ProceduralImages(DrawnImages):
    """Draws images from models of how pictures come about and asks the teacher what it sees; nothing is optimised.

    What all pictures have in common is in them (smooth regions with sharp edges, things before a ground, strokes), and
    nothing of the teacher's data. Few look like a class, so select them (`balanced_confidence`). In the spirit of
    Baradad et al. 2021 (Learning to See by Looking at Noise) and Asano & Saeed 2023 (distillation from one image).

    Args:
        models: what draws them, in equal parts: spectrum (clouds and textures), dead_leaves (shapes upon each other),
            strokes (writing, outlines), figures (a thing of a few parts before a ground).
        black: probability that the ground is black instead of any tone; from the constants of normalisation unless
            given, which say whether images are mostly dark.
        batch_size: images that are made at a time.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        models: Annotated[tuple[Model, ...], Field(min_length=1)] = tuple(MODELS),
        black: Fraction | None = None,
        batch_size: Positive = BATCH,
    ) -> None:
        super().__init__(setting, batch_size)
        self._models = models
        self._plain = plain_grounds(setting.space) if black is None else (black, 0.0)

    def _draw(self, count: int, rng: torch.Generator) -> Tensor:
        return nominal_from_unit(draw(self._models, count, self._setting.space, rng, plain=self._plain))


def _state(made: int) -> dict[str, Any]:
    return {"made": made}
