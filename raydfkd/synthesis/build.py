"""Synthesizers, generators in training and the student that they ask, put together as a recipe says."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import nn

from raydfkd.config.recipe import Recipe
from raydfkd.config.schema import PluginSpec, SynthesisSpec
from raydfkd.data.sources import SOURCES, Ranks
from raydfkd.data.student_versions import Source
from raydfkd.devices import dtype_of
from raydfkd.errors import RecipeError
from raydfkd.job import asks_student
from raydfkd.losses.objective import terms_that_need
from raydfkd.networks.observed import Need
from raydfkd.networks.student import fresh_student
from raydfkd.seeds import derive_seed
from raydfkd.synthesis.generator_training import GeneratorTraining
from raydfkd.synthesis.judge import StudentFeed
from raydfkd.synthesis.mixture import MixedSynthesizer
from raydfkd.synthesis.selection import SELECTORS, SelectingSynthesizer
from raydfkd.synthesis.setting import build_setting, is_compiled
from raydfkd.synthesis.student_feed import LiveStudentFeed, StoredStudentFeed
from raydfkd.synthesis.synthesizer import (
    SYNTHESIZERS,
    Synthesizer,
)
from raydfkd.synthesis.targets import TARGETS
from raydfkd.units import Request


def build_student(recipe: Recipe, teacher: nn.Module, source: Source, device: torch.device) -> StoredStudentFeed | None:
    """The student for the objective, where a term asks it; a fresh one until ``source`` has a version.

    Raises:
        RecipeError: it is asked where nobody trains it in time, or never where rounds are.
    """
    if not asks_student(recipe):
        if recipe.rounds > 1:
            raise RecipeError(
                f"rounds is {recipe.rounds}, but no term of synthesis.objective asks the student; add one of "
                f"{', '.join(terms_that_need(Need.STUDENT))}, or drop rounds"
            )
        return None
    if recipe.rounds == 1 and recipe.runtime.executor == "local":
        raise RecipeError(
            "synthesis.objective asks the student, but in one process it is trained after the synthesis; "
            "use rounds: 2 or more, or runtime.executor ray"
        )
    spec = recipe.synthesis
    return StoredStudentFeed(
        fresh_student(recipe, teacher),
        source,
        device=device,
        precision=dtype_of(spec.precision, device),
        compiled=is_compiled(recipe, device),
    )


def build_synthesizer(
    recipe: Recipe,
    teacher: nn.Module,
    device: torch.device,
    student: StudentFeed | None = None,
    *,
    is_trial: bool = False,
) -> Synthesizer:
    """Put judge and synthesizer together as the recipe says; arguments and errors of ``build_setting``."""
    spec = recipe.synthesis
    if spec.beside:

        def build(part: SynthesisSpec) -> Synthesizer:
            alone = recipe.model_copy(update={"synthesis": part})
            return build_synthesizer(alone, teacher, device, student, is_trial=is_trial)

        own = build(spec.model_copy(update={"beside": ()}))
        others = []
        for place, other in enumerate(spec.beside):
            try:
                others.append((other.images, build(spec.of_beside(other))))
            except RecipeError as error:
                blamed = [re.sub(r"^synthesis\b", f"synthesis.beside[{place}]", line) for line in error.lines]
                raise RecipeError(*blamed) from None
        return MixedSynthesizer([*others, (1.0, own)])
    setting = build_setting(recipe, teacher, device, student, is_trial=is_trial)
    synthesizer = SYNTHESIZERS.build(spec.synthesizer, spec.options, setting, where="synthesis")
    if spec.select is None:
        return synthesizer
    selector = SELECTORS.build(spec.select.kind, spec.select.options, where="synthesis.select")
    return SelectingSynthesizer(synthesizer, selector, spec.select, is_conditional=setting.targets.is_conditional)


def has_targets(recipe: Recipe) -> bool:
    """Whether images are made for a class each."""
    return _is_conditional(recipe.synthesis.targets)


def share_with_targets(recipe: Recipe) -> float:
    """Share of a unit's images that are made for a class each, between 0 and 1."""
    spec = recipe.synthesis
    parts = [(1.0, spec.targets), *((other.images, other.targets) for other in spec.beside)]
    asked = sum(images for images, targets in parts if _is_conditional(targets))
    return asked / sum(images for images, _ in parts)


def _is_conditional(targets: PluginSpec) -> bool:
    return bool(getattr(TARGETS.get(targets.kind, where="synthesis.targets"), "is_conditional", False))


def is_live(recipe: Recipe) -> bool:
    """Whether the student's source makes its images itself, against the student as it learns."""
    source = SOURCES.get(recipe.distill.source.kind, where="distill.source")
    return bool(getattr(source, "is_live", False))


def live_generator(
    recipe: Recipe,
    teacher: nn.Module,
    student: nn.Module,
    device: torch.device,
    *,
    steps: int = 1,
    rank: int = 0,
    parallel: Callable[[nn.Module], nn.Module] = lambda stack: stack,
    is_trial: bool = False,
) -> GeneratorTraining:
    """The recipe's generator in training against ``student``, the live module; for a live source.

    Args:
        recipe: says what is trained, and how.
        teacher: to invert.
        student: whose weights change between the generator's steps.
        device: of both.
        steps: of the generator, over which schedules run their course.
        rank: of this process, so that each draws its own latents.
        parallel: wraps the generator for data parallelism.
        is_trial: as ``build_synthesizer`` has it.

    Raises:
        RecipeError: the recipe's synthesizer trains no generator.
    """
    if recipe.synthesis.beside:
        raise RecipeError(
            f"synthesis.beside has {recipe.synthesis.beside[0].kind}, but distill.source live trains one generator; "
            "drop beside"
        )
    if recipe.synthesis.select is not None:
        raise RecipeError(
            f"synthesis.select is {recipe.synthesis.select.kind}, but distill.source live trains on every image that "
            "is made; drop select"
        )
    synthesizer = build_synthesizer(recipe, teacher, device, LiveStudentFeed(student), is_trial=is_trial)
    make = getattr(synthesizer, "training", None)
    if make is None:
        raise RecipeError(
            f"distill.source is live, but synthesizer {recipe.synthesis.synthesizer} trains no generator; use generator"
        )
    seeds = [derive_seed(recipe.seed, "live", label) for label in recipe.classes]
    request = Request(
        classes=recipe.classes, images_per_class=1, seed=derive_seed(recipe.seed, "live"), class_seeds=seeds
    )
    training: GeneratorTraining = make(request, steps=steps, parallel=parallel, rank=rank)
    return training


def generator_maker(
    recipe: Recipe, teacher: nn.Module, parallel: Callable[[nn.Module], nn.Module] = lambda stack: stack
) -> Callable[[nn.Module, int, Ranks, torch.device], GeneratorTraining] | None:
    """``live_generator`` for a training that knows its student, ranks and device; None where no source is live."""
    if not is_live(recipe):
        return None
    return lambda student, steps, ranks, device: live_generator(
        recipe, teacher, student, device, steps=steps, rank=ranks.rank, parallel=parallel
    )
