"""Training generators, one for each class of a unit or one for all of them, and drawing images from them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import nn

from raydfkd.config.schema import BelowOne, Fraction, Generator, PluginSpec, Positive, PositiveFloat, Spec
from raydfkd.data.batches import SyntheticBatch
from raydfkd.devices import is_out_of_memory
from raydfkd.networks.generators import StackedGenerators, StackForm
from raydfkd.networks.observed import Need
from raydfkd.synthesis.checkpoint import NO_HOOK, StepHook
from raydfkd.synthesis.generator_training import GeneratorDesign, GeneratorTraining
from raydfkd.synthesis.meta import MetaSpec
from raydfkd.synthesis.synthesizer import SYNTHESIZERS, Log, Progress, Setting
from raydfkd.units import Request

logger = logging.getLogger(__name__)


class Renewal(Spec):
    """Shrink and perturb (Ash & Adams 2020): new modes of the data for a fraction of the steps of a fresh start."""

    steps: Positive
    """Training steps after each renewal, before the next images."""
    keep: Fraction = 0.6
    """Share of the old weights; the rest comes from a fresh generator. 0 begins each batch with one, as CMI does."""
    latent_lr: PositiveFloat | None = None
    """Train the latents too, with this rate of Adam; the images are then those of the trained latents (Fang et al.
    2021, CMI)."""
    meta: MetaSpec | None = None
    """Begin each batch with weights that are learned over the batches, {lr: 0.01}, instead of with a share of the last
    ones (Fang et al. 2022, FastDFKD)."""
    noisy_layers: bool = False
    """Make latents of class embeddings, by linear layers that are drawn anew for each batch and trained with the
    generator (Tran et al. 2024, NAYER); for `conditional`."""
    life: Positive | None = None
    """Batches after which a fresh generator takes over, whatever ``keep`` is; unless given, none does."""

    @model_validator(mode="after")
    def _one_rule(self) -> Renewal:
        if self.meta is not None and "keep" in self.model_fields_set:
            raise ValueError(f"keep is {self.keep:g}, but meta says what a batch begins with; drop either")
        if self.meta is not None and self.life is not None:
            raise ValueError(f"life is {self.life}, but meta-learned weights go on; drop either")
        return self


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
        conditional: one generator for the unit, told the class beside the latents, by one-hot inputs or by
            `synthesis.embeddings`.
        lr: Adam's learning rate.
        betas: Adam's.
        emissions: times at which images are drawn, evenly spaced from the middle of training to its end.
        renewal: after each ``batch_per_class`` images of a class, draw the weights towards fresh ones and train on.
        form: how the stack is executed; auto, loop, vmap or grouped.
    """

    offers: ClassVar[frozenset[Need]] = frozenset({Need.LATENTS})

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
        if renewal is not None and renewal.noisy_layers and not conditional:
            raise ValueError("renewal.noisy_layers makes latents of what tells the class; use conditional: true")
        if conditional and not setting.targets.is_conditional:
            raise ValueError("conditional tells the generator its class, but targets are none; drop either")
        if setting.targets.is_soft:
            raise ValueError("targets are soft, but a generator is not told which it is to follow; use pixels")
        self._setting = setting
        self._steps = steps
        self._emissions = emissions
        self._renewal = renewal
        self._design = GeneratorDesign(
            generator=generator,
            conditional=conditional,
            batch_per_class=batch_per_class,
            lr=lr,
            betas=betas,
            latents=_latents_of(renewal),
            latent_lr=None if renewal is None else renewal.latent_lr,
            meta=None if renewal is None else renewal.meta,
            form=form,
        )
        StackedGenerators([self._design.build(setting)], form=form)

    def training(
        self,
        request: Request,
        *,
        steps: int | None = None,
        parallel: Callable[[nn.Module], nn.Module] = lambda stack: stack,
        rank: int = 0,
    ) -> GeneratorTraining:
        """Fresh generators for ``request`` whose steps the caller makes: what an online source holds.

        Args:
            request: classes and seeds; how many images it asks for does not matter.
            steps: after which schedules have run their course; those of the recipe unless given.
            parallel: wraps the stack for data parallelism.
            rank: of this process; it draws other latents than the others.
        """
        steps = self._steps if steps is None else steps
        return GeneratorTraining(self._setting, self._design, request, steps=steps, parallel=parallel, rank=rank)

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
                if has_images or self._design.batch_per_class == 1 or not is_out_of_memory(error):
                    raise
            size = self._design.batch_per_class
            logger.warning("no memory for %d images of each class; going on with half as many", size)
            self._design = replace(self._design, batch_per_class=size // 2)
            if self._setting.device.type == "cuda":
                torch.cuda.empty_cache()

    def num_steps(self, request: Request) -> int:
        """Training steps until the last images."""
        return max(self._draws(request, self._design.batch_per_class))

    def _train(
        self, request: Request, log: Log, hook: StepHook, saved: Mapping[str, Any] | None
    ) -> Iterator[SyntheticBatch]:
        size = self._design.batch_per_class if saved is None else saved["batch_per_class"]
        draws = self._draws(request, size)
        last = max(draws)
        training = GeneratorTraining(self._setting, replace(self._design, batch_per_class=size), request, steps=last)
        if saved is not None:
            training.load_state_dict(saved)
        progress = Progress(log, steps=last)
        # The training knows nothing of the unit's plan: which steps are followed by images, and how many, is decided
        # here. Images of a step are drawn before the hook is next called, so a saved state never lacks half of them.
        while training.step < last:
            hook(training.state_dict)
            value = training.update()
            progress(training.step, value)
            count = draws.get(training.step, 0)
            for start in range(0, count, size):
                yield training.sample(training.groups * min(size, count - start))
            if count and self._renewal is not None and training.step < last:
                training.renew(self._kept_after(draws, training.step))

    def _kept_after(self, draws: Mapping[int, int], step: int) -> float:
        """Share of the weights that the batch after ``step`` begins with."""
        assert self._renewal is not None, "weights are renewed"
        batches = sum(drawn <= step for drawn in draws)
        is_over = self._renewal.life is not None and batches % self._renewal.life == 0
        return 0.0 if is_over else self._renewal.keep

    def _draws(self, request: Request, size: int) -> dict[int, int]:
        """After which steps how many images of each class are drawn, ``size`` at a time."""
        count = request.count // self._setting.groups(request)
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


def _latents_of(renewal: Renewal | None) -> Literal["drawn", "trained", "noisy_layers"]:
    if renewal is None:
        return "drawn"
    if renewal.noisy_layers:
        return "noisy_layers"
    return "drawn" if renewal.latent_lr is None else "trained"
