"""Generators in training: one step after another, and images drawn from them at any time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raydfkd.config.schema import PluginSpec
from raydfkd.data.batches import SyntheticBatch
from raydfkd.images.pixels import nominal_from_unit
from raydfkd.losses.objective import ObjectiveValue
from raydfkd.networks.generators import GENERATORS, StackedGenerators, StackForm
from raydfkd.seeds import derive_seed, rng_from, seeded
from raydfkd.synthesis.judge import AskStudent
from raydfkd.synthesis.latents import DrawnLatents, Latents, NoisyLayers, TrainedLatents
from raydfkd.synthesis.meta import MetaSpec, MetaWeights
from raydfkd.synthesis.synthesizer import Setting
from raydfkd.units import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorDesign:
    """How generators are built and trained, whatever they make."""

    generator: PluginSpec
    """Architecture and its options."""
    conditional: bool
    """One generator for all classes, told the class beside the latents."""
    batch_per_class: int
    """Images of each class in a step; of all together where there are no targets."""
    lr: float
    """Adam's learning rate."""
    betas: tuple[float, float]
    """Adam's."""
    latents: Literal["drawn", "trained", "noisy_layers"] = "drawn"
    """What generators are given for an image; see ``synthesis.latents``."""
    latent_lr: float | None = None
    """Adam's learning rate of latents that are trained; that of the generators unless given."""
    meta: MetaSpec | None = None
    """How the weights are learned that each batch begins with; None where the last batch's go on."""
    form: StackForm = "auto"
    """How the stack is executed."""

    def build(self, setting: Setting, seed: int = 0, **changes: Any) -> Any:
        """One generator with weights drawn from ``seed``, with ``changes`` to its options."""
        options = self.generator.options | changes
        with seeded(seed):
            return GENERATORS.build(self.generator.kind, options, setting.space, where="synthesis.generator")


class GeneratorTraining:
    """The generators of one request, trained step by step; what they make can be drawn between any two steps.

    Offline synthesis runs it to its end and draws a unit's images. An online (adversarial) source makes some steps of
    it for each of the student's, against the student as it is, and draws the images of that step.

    Everything follows from the request's seeds, the number of steps and what the student answers. Without targets
    there is one generator that is told nothing, with them one for each class, or a conditional one for all.

    Args:
        setting: judge, image space, targets, augmentations and device.
        design: architecture and optimiser.
        request: classes and seeds; how many images it asks for does not matter here.
        steps: after which schedules have run their course; training may go on.
        parallel: wraps the stack for data parallelism, where several processes train one.
        rank: of this process; it draws other latents than the others.
    """

    def __init__(
        self,
        setting: Setting,
        design: GeneratorDesign,
        request: Request,
        *,
        steps: int,
        parallel: Callable[[nn.Module], nn.Module] = lambda stack: stack,
        rank: int = 0,
    ) -> None:
        is_conditional = setting.targets.is_conditional
        self._setting = setting
        self._design = design
        self._classes, self._class_seeds = request.classes, request.class_seeds
        self._steps = steps
        self.batch_per_class = design.batch_per_class
        """Images of each class in a step; of all together where there are no targets."""
        self.groups = setting.groups(request)
        """Equal, contiguous parts of a batch: one a class, where images have a class."""
        self.step = 0
        """Steps that were made."""
        seeds = request.class_seeds if is_conditional and not design.conditional else request.class_seeds[:1]
        # Not from the seeds of the weights, or the first latents would be functions of the first layer's weights.
        self._rngs = [rng_from(derive_seed(seed, "latents", rank)) for seed in seeds]
        self._latents = self._latents_of(cast("int", design.build(setting).latent))
        self._augmenting = rng_from(derive_seed(request.seed, "augment", rank))
        self._seed, self._rank = request.seed, rank
        self._targets = self._targets_of(self.batch_per_class)
        self._stack = self._fresh_stack([derive_seed(seed, "weights") for seed in seeds])
        self._forward = parallel(self._stack)
        self._objective = torch.zeros(())
        self._student: AskStudent | None = None
        self._turn = 0  # the class that is next to have an image less than others
        self._meta = None if design.meta is None else MetaWeights(list(self._stack.parameters()), design.meta)
        setting.judge.objective.begin()
        self._restart()

    def reseed(self, seed: int) -> None:
        """Draw latents and augmentations from ``seed`` on, so that a step follows from its number."""
        for number, rng in enumerate(self._rngs):
            rng.manual_seed(derive_seed(seed, "latents", number))
        self._augmenting.manual_seed(derive_seed(seed, "augment"))

    def update(self, student: AskStudent | None = None) -> ObjectiveValue:
        """Make one step; terms that ask the student ask ``student``, the judge's own unless given."""
        judge = self._setting.judge
        self._student = student
        progress = min(1.0, self.step / self._steps)
        with self._own_random_numbers("step"):
            latents = self._latents()
            images = self._images(self._forward, latents)
            seen, targets = self._setting.seen(
                images, self._targets, self._augmenting, augment=self._setting.augment, progress=progress
            )
            _, value = judge(
                seen, targets, latents.flatten(0, 1), groups=self.groups, progress=progress, student=student
            )
            self._optimizer.zero_grad()
            # Terms are means over images; the sum over classes keeps a class's gradient free of its neighbours.
            (value.total * self.groups).backward()
        if self._meta is not None:
            self._meta.note_gradients()
        self._optimizer.step()
        self._objective = value.total.detach()
        self.step += 1
        return value

    @torch.no_grad()
    def sample(self, n: int) -> SyntheticBatch:
        """Draw ``n`` images, class by class; where they cannot be shared out evenly, classes take turns at one less.

        A generator's BatchNorm makes an image depend on its batch, so whole batches are made, as large as those that
        the generators are trained with, and what is too much is left out.
        """
        each = -(-n // self.groups)
        rows = torch.ones(self.groups, each, dtype=torch.bool)
        surplus = each * self.groups - n
        rows[[(self._turn + number) % self.groups for number in range(surplus)], -1] = False
        self._turn = (self._turn + surplus) % self.groups

        def kept(batches: Sequence[Tensor]) -> Tensor:
            by_class = torch.cat([batch.unflatten(0, (self.groups, -1)) for batch in batches], 1)
            return by_class[:, :each][rows.to(by_class.device)]

        latents = [self._latents() for _ in range(0, each, self.batch_per_class)]
        images = [self._images(self._stack, some) for some in latents]
        targets = self._targets_of(each)
        with self._own_random_numbers("sample"):
            return self._setting.judge.keep(
                kept(images),
                None if targets is None else kept([targets]),
                self._objective.item(),
                latents=kept([some.flatten(0, 1) for some in latents]),
                student=self._student,
            )

    @torch.no_grad()
    def renew(self, keep: float) -> None:
        """Shrink and perturb: keep that share of the weights, with a new optimiser and, where trained, new latents.

        Weights that are meta-learned go back to those instead, once these have learned from the batch.
        """
        if self._meta is not None:
            self._meta.learn()
        elif keep < 1:
            fresh = self._fresh_stack([int(torch.randint(1 << 62, (), generator=rng)) for rng in self._rngs])
            for weights, others in zip(self._stack.parameters(), fresh.parameters(), strict=True):
                weights.lerp_(others, 1 - keep)
        self._restart()

    def state_dict(self) -> dict[str, Any]:
        """Everything that training goes on from, as tensors and plain data."""
        return {
            "stack": self._stack.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "rngs": [rng.get_state() for rng in self._rngs],
            "augmenting": self._augmenting.get_state(),
            "latents": self._latents.state_dict(),
            "meta": None if self._meta is None else self._meta.state_dict(),
            "step": self.step,
            "turn": self._turn,
            "objective": self._objective,
            "batch_per_class": self.batch_per_class,
            "terms": self._setting.judge.objective.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, that of a training of the same request and design."""
        self._stack.load_state_dict(state["stack"])
        self._latents.load_state_dict(state["latents"])
        if self._meta is not None:
            self._meta.load_state_dict(state["meta"])
        self._optimizer.load_state_dict(state["optimizer"])
        for rng, position in zip(self._rngs, state["rngs"], strict=True):
            rng.set_state(position)
        self._augmenting.set_state(state["augmenting"])
        self._objective = state["objective"]
        self._setting.judge.objective.resume(state["terms"], self._setting.device)
        self.step, self._turn = state["step"], state["turn"]

    def _own_random_numbers(self, purpose: str) -> AbstractContextManager[None]:
        """For networks that draw global ones (dropout, terms of the user's)."""
        return seeded(derive_seed(self._seed, purpose, self.step, self._rank), self._setting.device)

    def _restart(self) -> None:
        """A new optimiser, of what terms train too, and new latents where they are trained."""
        groups: list[dict[str, Any]] = [{"params": list(self._stack.parameters())}]
        self._latents.renew()
        if self._latents.trained:
            lr = self._design.lr if self._design.latent_lr is None else self._design.latent_lr
            groups.append({"params": list(self._latents.trained), "lr": lr})
        groups += self._setting.judge.objective.parameter_groups()
        self._optimizer = torch.optim.Adam(groups, lr=self._design.lr, betas=self._design.betas, fused=True)

    def _fresh_stack(self, seeds: Sequence[int]) -> StackedGenerators:
        given = {"latent": self._latents.width} if self._design.conditional else {}
        generators = [self._design.build(self._setting, seed, **given) for seed in seeds]
        return StackedGenerators(generators, form=self._design.form).to(self._setting.device)

    def _targets_of(self, images_per_class: int) -> Tensor | None:
        rngs = [rng_from(derive_seed(seed, "targets")) for seed in self._class_seeds]
        targets = self._setting.targets(self._classes, images_per_class, rngs)
        return None if targets is None else targets.to(self._setting.device)

    def _latents_of(self, latent: int) -> Latents:
        """The latents of the design, where generators draw ``latent`` numbers for an image."""
        design, device = self._design, self._setting.device
        if not design.conditional:
            make = DrawnLatents if design.latents == "drawn" else TrainedLatents
            return make(self._rngs, count=self.batch_per_class, latent=latent, codes=None, device=device)
        embeddings = self._setting.embeddings
        known = torch.eye(len(self._classes)) if embeddings is None else embeddings[list(self._classes)]
        # As long as a latent vector is on average, so that neither drowns the other.
        codes = F.normalize(known) * math.sqrt(latent)
        codes = codes.repeat_interleave(self.batch_per_class, 0)
        if design.latents == "noisy_layers":
            [rng] = self._rngs
            return NoisyLayers(rng, codes=codes, classes=len(self._classes), latent=latent, device=device)
        make = DrawnLatents if design.latents == "drawn" else TrainedLatents
        return make(self._rngs, count=len(codes), latent=latent, codes=codes, device=device)

    def _images(self, stack: nn.Module, latents: Tensor) -> Tensor:
        """Nominal images [P * N, C, H, W], made in the arithmetic of the teacher."""
        with self._setting.judge.teacher.precision(self._setting.device.type):
            images: Tensor = stack(latents)
        return nominal_from_unit(images.float())
