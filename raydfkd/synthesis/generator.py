"""Training generators, one for each class of a unit or one for all of them, and drawing images from them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from raydfkd.config.schema import BelowOne, Fraction, Generator, PluginSpec, Positive, PositiveFloat, Spec
from raydfkd.data.batches import SyntheticBatch
from raydfkd.devices import is_out_of_memory
from raydfkd.networks.generators import GENERATORS, StackedGenerators, StackForm
from raydfkd.seeds import rng_from
from raydfkd.synthesis.checkpoint import NO_HOOK, StepHook
from raydfkd.synthesis.synthesizer import SYNTHESIZERS, Log, Progress, Setting
from raydfkd.units import Request

logger = logging.getLogger(__name__)


class Renewal(Spec):
    """Shrink and perturb (Ash & Adams 2020): new modes of the data for a fraction of the steps of a fresh start."""

    steps: Positive
    """Training steps after each renewal, before the next images."""
    keep: Fraction = 0.6
    """Share of the old weights; the rest comes from a fresh generator."""
    latent_lr: PositiveFloat | None = None
    """Train the latents too, with this rate of Adam; the images are then those of the trained latents (Fang et al.
    2021, CMI)."""


@dataclass(slots=True, kw_only=True)
class _Pack:
    """The generators of one unit and everything their training goes on from."""

    stack: StackedGenerators
    optimizer: torch.optim.Optimizer = field(init=False)
    latent: int
    """Random numbers of a latent vector."""
    rngs: list[torch.Generator]
    augmenting: torch.Generator
    codes: Tensor | None
    """[classes, classes]: what a conditional generator is told of each class; None where each class has its own."""
    batch_per_class: int
    """Images of each class in a step."""
    trained: Tensor | None = None
    """Latents [P, N, Z] of the images to come, where those are trained."""
    step: int = 0
    """Training steps that were made."""

    def state_dict(self) -> dict[str, Any]:
        """What training goes on from."""
        return {
            "stack": self.stack.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rngs": [rng.get_state() for rng in self.rngs],
            "augmenting": self.augmenting.get_state(),
            "trained": None if self.trained is None else self.trained.detach(),
            "step": self.step,
            "batch_per_class": self.batch_per_class,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; the optimiser is that of the same weights and latents."""
        self.stack.load_state_dict(state["stack"])
        if self.trained is not None:
            with torch.no_grad():
                self.trained.copy_(state["trained"])
        self.optimizer.load_state_dict(state["optimizer"])
        for rng, position in zip(self.rngs, state["rngs"], strict=True):
            rng.set_state(position)
        self.augmenting.set_state(state["augmenting"])
        self.step = state["step"]

    def latents(self, device: torch.device) -> Tensor:
        """Latents [P, N, Z] of a step's images, codes beside them; trained ones where there are."""
        noise = self.trained if self.trained is not None else self.noise(device)
        if self.codes is None:
            return noise
        return torch.cat([noise, self.codes.repeat_interleave(self.batch_per_class, 0).unsqueeze(0).to(device)], 2)

    def noise(self, device: torch.device) -> Tensor:
        """Standard normal numbers [P, N, Z], each generator's from its own."""
        count = self.batch_per_class if self.codes is None else self.batch_per_class * len(self.codes)
        return torch.stack([torch.randn(count, self.latent, generator=rng) for rng in self.rngs]).to(device)


@SYNTHESIZERS.register("generator")
class GeneratorSynthesizer:
    """Trains one generator for each class of the unit, all of them as one stack, and draws the images from them.

    Every unit starts from fresh generators, so its images follow from its seeds alone; repeats of a class come from
    different generators, which is where most of the set's diversity comes from. With ``conditional`` one generator
    serves all classes of the unit; without targets (``targets: none``) one that is told nothing. Source: Luo et al.
    2020, one generator per class; the moments are matched over the pack unless the term's scope is class.

    Args:
        steps: training steps of the generators; with ``renewal`` those before the first images.
        batch_per_class: images of each class in a training step.
        generator: architecture and its options.
        conditional: one generator for the unit, told the class by one-hot inputs beside the latents.
        lr: Adam's learning rate.
        betas: Adam's.
        emissions: times at which images are drawn, evenly spaced from the middle of training to its end.
        renewal: after each ``batch_per_class`` images of a class, draw the weights towards fresh ones and train on.
        form: how the stack is executed; auto, loop, vmap or grouped.
    """

    def __init__(  # noqa: PLR0913 - the options of a recipe
        self,
        setting: Setting,
        *,
        steps: Positive,
        batch_per_class: Positive,
        generator: Generator = PluginSpec(kind="conv"),  # noqa: B008 - frozen
        conditional: bool = False,
        lr: PositiveFloat = 5e-3,
        betas: tuple[BelowOne, BelowOne] = (0.5, 0.9),
        emissions: Positive = 1,
        renewal: Renewal | None = None,
        form: StackForm = "auto",
    ) -> None:
        if emissions > max(1, steps // 2):
            raise ValueError(
                f"emissions is {emissions}, but half of {steps} steps are fewer; use at most {max(1, steps // 2)}"
            )
        if renewal is not None and emissions > 1:
            raise ValueError(f"emissions is {emissions}, but with renewal images are drawn after each one; drop either")
        built = GENERATORS.build(generator.kind, generator.options, setting.space, where="synthesis.generator")
        StackedGenerators([built], form=form)
        self._latent = cast("int", built.latent)
        self._setting = setting
        self._steps = steps
        self._batch_per_class = batch_per_class
        self._generator = generator
        self._conditional = conditional
        self._lr, self._betas = lr, betas
        self._emissions = emissions
        self._renewal = renewal
        self._form: StackForm = form

    def produce(self, request: Request, log: Log, hook: StepHook = NO_HOOK) -> Iterator[SyntheticBatch]:
        """Train the unit's generators and stream their images.

        A batch that does not fit into memory is halved, for this unit and those after it.
        """
        saved = hook.resumed()
        has_images = saved is not None  # or may have
        while True:
            try:
                for batch in self._train(request, log, hook, saved):
                    has_images = True
                    yield batch
                return
            except (RuntimeError, MemoryError) as error:
                # Once images are out the unit cannot begin again: it would make them twice.
                if has_images or self._batch_per_class == 1 or not is_out_of_memory(error):
                    raise
            logger.warning("no memory for %d images of each class; going on with half as many", self._batch_per_class)
            self._batch_per_class //= 2
            if self._setting.device.type == "cuda":
                torch.cuda.empty_cache()

    def num_steps(self, request: Request) -> int:
        """Training steps until the last images."""
        return max(self._draws(request.count // self._groups(request.classes), self._batch_per_class))

    def _train(
        self, request: Request, log: Log, hook: StepHook, saved: Mapping[str, Any] | None
    ) -> Iterator[SyntheticBatch]:
        pack = self._start(request, self._batch_per_class if saved is None else saved["batch_per_class"])
        if saved is not None:
            pack.load_state_dict(saved)
        classes = request.classes
        draws = self._draws(request.count // self._groups(classes), pack.batch_per_class)
        last = max(draws)
        progress = Progress(log, steps=last)
        targets = self._targets(classes, pack.batch_per_class)
        while pack.step < last:
            hook(pack.state_dict)
            value = self._update(pack, targets, self._groups(classes))
            pack.step += 1
            progress(pack.step, value)
            if pack.step in draws:
                yield from self._sample(pack, classes, draws[pack.step], value.total.item())
                if self._renewal is not None and pack.step < last:
                    self._renew(pack, self._renewal.keep)

    def _draws(self, count: int, size: int) -> dict[int, int]:
        """After which steps how many images of each class are drawn, ``count`` in all, ``size`` at a time."""
        if self._renewal is not None:
            return {
                self._steps + self._renewal.steps * index: min(size, count - start)
                for index, start in enumerate(range(0, count, size))
            }
        times = self._emissions
        first = self._steps - self._steps // 2 if times > 1 else self._steps
        return {
            first + (self._steps - first) * index // max(1, times - 1): count * (index + 1) // times
            - count * index // times
            for index in range(times)
        }

    @torch.no_grad()
    def _renew(self, pack: _Pack, keep: float) -> None:
        """Shrink and perturb; the optimiser starts anew with the weights."""
        fresh = self._stack([int(torch.randint(1 << 62, (), generator=rng)) for rng in pack.rngs], pack.codes)
        for weights, others in zip(pack.stack.parameters(), fresh.parameters(), strict=True):
            weights.lerp_(others, 1 - keep)
        self._restart(pack)

    def _start(self, request: Request, batch_per_class: int) -> _Pack:
        has_many = self._setting.targets.is_conditional and not self._conditional
        seeds = request.class_seeds if has_many else request.class_seeds[:1]
        codes = None
        if self._conditional:
            # As long as a latent vector is on average, so that neither drowns the other.
            codes = torch.eye(len(request.classes)) * math.sqrt(self._latent)
        pack = _Pack(
            stack=self._stack(seeds, codes),
            latent=self._latent,
            rngs=[rng_from(seed) for seed in seeds],
            augmenting=rng_from(request.seed),
            codes=codes,
            batch_per_class=batch_per_class,
        )
        self._restart(pack)
        return pack

    def _stack(self, seeds: Sequence[int], codes: Tensor | None) -> StackedGenerators:
        beside: dict[str, Any] = {} if codes is None else {"latent": self._latent + len(codes)}
        generators = [self._fresh_generator(seed, beside) for seed in seeds]
        return StackedGenerators(generators, form=self._form).to(self._setting.device)

    def _restart(self, pack: _Pack) -> None:
        """A new optimiser, and new latents where they are trained."""
        groups: list[dict[str, Any]] = [{"params": list(pack.stack.parameters())}]
        if self._renewal is not None and self._renewal.latent_lr is not None:
            pack.trained = pack.noise(self._setting.device).requires_grad_()
            groups.append({"params": [pack.trained], "lr": self._renewal.latent_lr})
        pack.optimizer = torch.optim.Adam(groups, lr=self._lr, betas=self._betas, fused=True)

    def _fresh_generator(self, seed: int, changes: dict[str, Any]) -> Any:
        options = self._generator.options | changes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return GENERATORS.build(self._generator.kind, options, self._setting.space, where="synthesis.generator")

    def _groups(self, classes: tuple[int, ...]) -> int:
        """Equal, contiguous parts of a batch: one a class, where images have a class."""
        return len(classes) if self._setting.targets.is_conditional else 1

    def _targets(self, classes: tuple[int, ...], images_per_class: int) -> Tensor | None:
        targets = self._setting.targets(classes, images_per_class)
        return None if targets is None else targets.to(self._setting.device)

    def _update(self, pack: _Pack, targets: Tensor | None, groups: int) -> Any:
        judge = self._setting.judge
        latents = pack.latents(self._setting.device)
        images = judge.pixels.normalize(self._images(pack, latents))
        seen = self._setting.augment(images, pack.augmenting)
        _, value = judge(seen, targets, latents.flatten(0, 1), groups=groups)
        pack.optimizer.zero_grad()
        # Terms are means over images; the sum over classes keeps a class's gradient free of its neighbours.
        (value.total * groups).backward()
        pack.optimizer.step()
        return value

    def _images(self, pack: _Pack, latents: Tensor) -> Tensor:
        """Images [P * N, C, H, W] in [0, 1], made in the arithmetic of the teacher."""
        with self._setting.judge.teacher.precision(self._setting.device.type):
            images: Tensor = pack.stack(latents)
        return images.float()

    @torch.no_grad()
    def _sample(self, pack: _Pack, classes: tuple[int, ...], count: int, objective: float) -> Iterator[SyntheticBatch]:
        """Draw ``count`` images of each class, in batches of the size that the generators were trained with."""
        groups = self._groups(classes)
        judge = self._setting.judge
        for start in range(0, count, pack.batch_per_class):
            # Always whole batches, because a generator's BatchNorm makes an image depend on its batch.
            latents = pack.latents(self._setting.device)
            images = self._images(pack, latents).unflatten(0, (groups, -1))
            kept = images[:, : count - start].flatten(0, 1)
            targets = self._targets(classes, min(pack.batch_per_class, count - start))
            yield judge.keep(judge.pixels.normalize(kept), targets, objective)
