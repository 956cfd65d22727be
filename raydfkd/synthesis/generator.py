"""Training generators, one for each class of a unit, and drawing images from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raydfkd.batches import SyntheticBatch
from raydfkd.generators import GENERATORS, StackedGenerators, StackForm
from raydfkd.recipe import BelowOne, PluginSpec, Positive, PositiveFloat
from raydfkd.schedule import Request
from raydfkd.synthesis.synthesizer import SYNTHESIZERS, Log, Progress, Setting, rng_from


@dataclass(slots=True, kw_only=True)
class _Pack:
    """The generators of one unit and everything their training goes on from."""

    stack: StackedGenerators
    optimizer: torch.optim.Optimizer
    latent: int
    rngs: list[torch.Generator]
    augmenting: torch.Generator

    def latents(self, count: int, device: torch.device) -> Tensor:
        """Standard normal latents [P, count, Z], each generator's from its own random numbers."""
        return torch.stack([torch.randn(count, self.latent, generator=rng) for rng in self.rngs]).to(device)


@SYNTHESIZERS.register("generator")
class GeneratorSynthesizer:
    """Trains one generator for each class of the unit, all of them as one stack, and draws the images from them.

    Every unit starts from fresh generators, so its images follow from its seeds alone; repeats of a class come from
    different generators, which is where most of the set's diversity comes from. Unconditional (``targets: none``)
    it trains a single generator. Source: Luo et al. 2020, one generator per class; the moments are matched over the
    pack unless the term's scope is class.

    Args:
        steps: training steps of the generators.
        batch_per_class: images of each class in a training step.
        generator: architecture and its options.
        lr: Adam's learning rate.
        betas: Adam's.
        emissions: times at which images are drawn, evenly spaced from the middle of training to its end.
        form: how the stack is executed; auto, loop or vmap.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        steps: Positive,
        batch_per_class: Positive,
        generator: PluginSpec = PluginSpec(kind="conv"),  # noqa: B008 - frozen
        lr: PositiveFloat = 5e-3,
        betas: tuple[BelowOne, BelowOne] = (0.5, 0.9),
        emissions: Positive = 1,
        form: StackForm = "auto",
    ) -> None:
        if emissions > max(1, steps // 2):
            raise ValueError(
                f"emissions is {emissions}, but half of {steps} steps are fewer; use at most {max(1, steps // 2)}"
            )
        GENERATORS.build(generator.kind, generator.options, setting.space, where="synthesis.generator")
        self._setting = setting
        self._steps = steps
        self._batch_per_class = batch_per_class
        self._generator = generator
        self._lr, self._betas = lr, betas
        self._emissions = emissions
        self._form: StackForm = form

    def produce(self, request: Request, log: Log) -> Iterator[SyntheticBatch]:
        """Train the unit's generators and stream their images."""
        pack = self._start(request)
        groups = len(pack.rngs)
        classes = request.classes
        progress = Progress(log, steps=self._steps)
        first = self._steps - self._steps // 2 if self._emissions > 1 else self._steps
        emit_at = [
            first + (self._steps - first) * index // max(1, self._emissions - 1) for index in range(self._emissions)
        ]
        count = request.count // groups
        shares = [
            count * (index + 1) // self._emissions - count * index // self._emissions for index in range(len(emit_at))
        ]
        targets = self._targets(classes, self._batch_per_class)
        for step in range(1, self._steps + 1):
            value = self._update(pack, targets, groups)
            progress(step, value)
            if step in emit_at:
                objective = value.total.item()
                yield from self._sample(pack, classes, shares[emit_at.index(step)], objective)

    def _start(self, request: Request) -> _Pack:
        seeds = request.class_seeds if self._setting.targets.is_conditional else request.class_seeds[:1]
        generators = [self._fresh_generator(seed) for seed in seeds]
        stack = StackedGenerators(generators, form=self._form).to(self._setting.device)
        return _Pack(
            stack=stack,
            optimizer=torch.optim.Adam(stack.parameters(), lr=self._lr, betas=self._betas),
            latent=int(generators[0].latent),
            rngs=[rng_from(seed) for seed in seeds],
            augmenting=rng_from(request.seed),
        )

    def _fresh_generator(self, seed: int) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return GENERATORS.build(
                self._generator.kind, self._generator.options, self._setting.space, where="synthesis.generator"
            )

    def _targets(self, classes: tuple[int, ...], images_per_class: int) -> Tensor | None:
        targets = self._setting.targets(classes, images_per_class)
        return None if targets is None else targets.to(self._setting.device)

    def _update(self, pack: _Pack, targets: Tensor | None, groups: int) -> Any:
        judge = self._setting.judge
        latents = pack.latents(self._batch_per_class, self._setting.device)
        images = judge.pixels.normalize(pack.stack(latents))
        seen = self._setting.augment(images, pack.augmenting)
        _, value = judge(seen, targets, latents.flatten(0, 1), groups=groups)
        pack.optimizer.zero_grad()
        # Terms are means over images; the sum over classes keeps a class's gradient free of its neighbours.
        (value.total * groups).backward()
        pack.optimizer.step()
        return value

    @torch.no_grad()
    def _sample(self, pack: _Pack, classes: tuple[int, ...], count: int, objective: float) -> Iterator[SyntheticBatch]:
        """Draw ``count`` images from each generator, in batches of the size they were trained with."""
        judge = self._setting.judge
        for start in range(0, count, self._batch_per_class):
            # Always whole batches, because a generator's BatchNorm makes an image depend on its batch.
            latents = pack.latents(self._batch_per_class, self._setting.device)
            images = pack.stack(latents).unflatten(0, (len(pack.rngs), -1))
            kept = images[:, : count - start].flatten(0, 1)
            targets = self._targets(classes, min(self._batch_per_class, count - start))
            yield judge.keep(judge.pixels.normalize(kept), targets, objective)
