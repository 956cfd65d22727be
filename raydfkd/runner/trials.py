"""Trials of a recipe: each of its synthesizers alone, and its student, on few images and for few steps."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from raydfkd.config.recipe import Recipe
from raydfkd.config.schema import SynthesisSpec
from raydfkd.data.sources import StudentBatch
from raydfkd.devices import dtype_of
from raydfkd.distillation.loss import StudentLoss
from raydfkd.distillation.trainer import StepHooks, StudentTrainer, ignore
from raydfkd.images.pixels import PixelRange
from raydfkd.job import asks_student
from raydfkd.networks.build import build_network
from raydfkd.networks.layout import lay_channels_last
from raydfkd.networks.observed import ObservedNetwork
from raydfkd.synthesis.build import build_student, build_synthesizer, has_targets
from raydfkd.synthesis.canvas import Stage
from raydfkd.synthesis.drawn import BATCH
from raydfkd.synthesis.synthesizer import Synthesizer
from raydfkd.units import Request

MANY_STEPS = 1_000
"""Steps of a student's schedule in a trial, so that none of them is its last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Images in work at once."""

    classes: int
    images_per_class: int

    @property
    def images(self) -> int:
        """Images in total."""
        return self.classes * self.images_per_class

    def at_most(self, classes: int, images_per_class: int) -> Batch:
        """The same, or of fewer classes or images of each."""
        return Batch(classes=min(classes, self.classes), images_per_class=min(images_per_class, self.images_per_class))


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One of the synthesizers that share the images of a unit, by itself."""

    recipe: Recipe
    """The recipe with this synthesizer alone, which keeps all that it makes."""
    share: float
    """Images that it makes for each one of the set."""
    where: str
    """Key of its section."""

    @property
    def key(self) -> str:
        """Key of the size of its batches."""
        return f"{self.where}.{'batch_per_class' if self.trains_generators else 'batch_size'}"

    @property
    def images_of_one(self) -> int:
        """Images of a batch for each 1 of that key."""
        return self.batch.classes if self.trains_generators else 1

    @property
    def options(self) -> Mapping[str, Any]:
        """The section as plain data, options of the synthesizer among its keys."""
        return self.recipe.synthesis.model_dump(mode="json")

    @property
    def stages(self) -> list[Stage]:
        """Stages of an optimisation of pixels; none where there is another synthesizer."""
        return [Stage.model_validate_json(json.dumps(stage)) for stage in self.options.get("stages", ())]

    @property
    def trains_generators(self) -> bool:
        """Whether it trains generators."""
        return "batch_per_class" in self.options

    @property
    def images_per_class(self) -> float:
        """Images of each class that it makes for a unit."""
        return self.share * self.recipe.transfer_set.unit.images_per_class

    @property
    def batch(self) -> Batch:
        """The images in work at once, where the unit has so many."""
        unit, options = self.recipe.transfer_set.unit, self.options
        if self.trains_generators:
            return Batch(
                classes=unit.classes if has_targets(self.recipe) else 1, images_per_class=options["batch_per_class"]
            )
        most = max(1, round(self.images_per_class))
        if "stages" in options:
            return Batch(
                classes=unit.classes, images_per_class=min(most, max(1, options["batch_size"] // unit.classes))
            )
        return Batch(classes=1, images_per_class=min(most * unit.classes, options.get("batch_size", BATCH)))

    @property
    def batches(self) -> int:
        """Batches that it makes for a unit."""
        return -(-max(1, round(self.images_per_class)) * self.recipe.transfer_set.unit.classes // self.batch.images)

    def steps_of(self, batches: int) -> list[int]:
        """Steps that so many batches of a unit take, in each stage; a drawn batch is one."""
        options = self.options
        if "stages" in options:
            return [batches * stage["steps"] for stage in options["stages"]]
        if not self.trains_generators:
            return [batches]
        renewal = options.get("renewal")
        return [options["steps"] + (renewal["steps"] * (batches - 1) if renewal else 0)]

    def trial(self, batch: Batch, *, steps: int, **changes: Any) -> Part:
        """The same with such batches, and at most so many steps in a stage and after a renewal.

        ``changes`` are made to the section before that.
        """
        options = {**self.options, **changes}
        return replace(self, recipe=self.recipe.with_synthesis(options | _shortened(options, batch, steps)))


def _shortened(options: Mapping[str, Any], batch: Batch, steps: int) -> dict[str, Any]:
    """Changes to a section."""
    if "stages" in options:
        stages = [{**stage, "steps": min(steps, stage["steps"])} for stage in options["stages"]]
        return {"batch_size": batch.images, "stages": stages}
    if "batch_per_class" not in options:
        return {"batch_size": batch.images}
    changes: dict[str, Any] = {"batch_per_class": batch.images_per_class, "steps": min(steps, options["steps"])}
    if options.get("renewal"):
        renewal = options["renewal"]
        changes["renewal"] = {**renewal, "steps": min(steps, renewal["steps"])}
    if "emissions" in options:
        changes["emissions"] = min(options["emissions"], max(1, changes["steps"] // 2))
    return changes


def parts_of(recipe: Recipe) -> list[Part]:
    """The section's own synthesizer, then those beside it."""
    spec = recipe.synthesis
    total = 1 + sum(other.images for other in spec.beside)
    own = _part(recipe, 1 / total, spec.model_copy(update={"beside": ()}), "synthesis")
    return [
        own,
        *(
            _part(recipe, other.images / total, spec.of_beside(other), f"synthesis.beside[{place}]")
            for place, other in enumerate(spec.beside)
        ),
    ]


def _part(recipe: Recipe, share: float, section: SynthesisSpec, where: str) -> Part:
    candidates = 1.0 if section.select is None else section.select.candidates
    alone = recipe.model_copy(update={"synthesis": section.model_copy(update={"select": None})})
    return Part(recipe=alone, share=share * candidates, where=where)


def synthesizer_of(trial: Recipe, teacher: nn.Module, device: torch.device) -> Synthesizer:
    """The synthesizer of a trial, with a fresh student where a term asks one.

    Raises:
        RecipeError: the recipe is wrong, or does not suit the teacher.
    """
    student = build_student(trial, teacher, lambda _: None, device) if asks_student(trial) else None
    return build_synthesizer(trial, teacher, device, student, is_trial=True)


def request_for(recipe: Recipe, batch: Batch, *, batches: int = 1) -> Request:
    """A request for so many batches, of the first classes of the recipe's first unit."""
    request = recipe.plan()[0].request
    return replace(
        request,
        classes=request.classes[: batch.classes],
        class_seeds=request.class_seeds[: batch.classes],
        images_per_class=batches * batch.images_per_class,
    )


def trainer_of(recipe: Recipe, teacher: nn.Module, device: torch.device) -> StudentTrainer:
    """The recipe's student in training, a fresh one that nobody is told of."""
    spec = recipe.distill.model_copy(update={"steps": MANY_STEPS})
    student = build_network(recipe.student, recipe.teacher, where="student", seed=0)
    precision = dtype_of(spec.precision, device)
    taps = StudentLoss(spec).teacher_taps
    return StudentTrainer(
        lay_channels_last(student.to(device)),
        ObservedNetwork(teacher, taps=taps, frozen=True, precision=precision).to(device),
        spec,
        pixels=PixelRange(recipe.teacher.image_space, device, made=recipe.made_space),
        device=device,
        seed=0,
        hooks=StepHooks(on_log=ignore),
    )


def noise_batches(recipe: Recipe, images: int) -> Iterator[StudentBatch]:
    """The same batch of noise for a student, again and again."""
    rng = torch.Generator().manual_seed(0)
    batch = StudentBatch(
        images=torch.randint(256, (images, *recipe.made_space.shape), dtype=torch.uint8, generator=rng),
        labels=torch.randint(recipe.teacher.classes, (images,), generator=rng),
        teacher_logits=torch.randn(images, recipe.teacher.classes, generator=rng).half(),
        snapshot_images=images,
    )
    return itertools.repeat(batch)
