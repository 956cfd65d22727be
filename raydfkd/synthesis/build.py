"""Judge and synthesizer, put together as a recipe says."""

from __future__ import annotations

import torch
from torch import nn

from raydfkd.config.recipe import Recipe
from raydfkd.data.student_versions import Source
from raydfkd.errors import RecipeError
from raydfkd.images.augment import build_augmentations
from raydfkd.images.pixels import PixelRange
from raydfkd.job import asks_student
from raydfkd.losses.objective import build_objective
from raydfkd.networks.build import build_network
from raydfkd.networks.observed import ObservedNetwork
from raydfkd.seeds import derive_seed
from raydfkd.synthesis.judge import Judge, StudentFeed
from raydfkd.synthesis.student_feed import StoredStudentFeed
from raydfkd.synthesis.synthesizer import SYNTHESIZERS, Setting, Synthesizer
from raydfkd.synthesis.targets import TARGETS


def build_student(recipe: Recipe, source: Source, device: torch.device) -> StoredStudentFeed | None:
    """The student for the objective, where a term asks it; a fresh one until ``source`` has a version.

    Raises:
        RecipeError: it is asked where nobody trains it in time, or never where rounds are.
    """
    if not asks_student(recipe):
        if recipe.rounds > 1:
            raise RecipeError(
                f"rounds is {recipe.rounds}, but no term of synthesis.objective asks the student; add competition, "
                "logit_gap or decision_gap, or drop rounds"
            )
        return None
    if recipe.rounds == 1 and recipe.runtime.executor == "local":
        raise RecipeError(
            "synthesis.objective asks the student, but in one process it is trained after the synthesis; "
            "use rounds: 2 or more, or runtime.executor ray"
        )
    spec = recipe.synthesis
    seed = derive_seed(recipe.seed, "student")
    return StoredStudentFeed(
        build_network(recipe.student, recipe.teacher, where="student", seed=seed),
        source,
        device=device,
        precision=getattr(torch, spec.precision),
        compiled=device.type == "cuda" if spec.compile == "auto" else spec.compile,
    )


def build_synthesizer(
    recipe: Recipe, teacher: nn.Module, device: torch.device, student: StudentFeed | None = None
) -> Synthesizer:
    """Put judge and synthesizer together as the recipe says, with the ``student`` that its objective may ask.

    Raises:
        RecipeError: anything in ``synthesis`` that is unknown, of the wrong type or does not suit the teacher.
    """
    spec = recipe.synthesis
    targets = TARGETS.build(spec.targets.kind, spec.targets.options, where="synthesis.targets")
    objective = build_objective(
        spec.objective,
        has_targets=targets.is_conditional,
        has_latents=spec.synthesizer == "generator",
        has_student=student is not None,
    ).to(device)
    observed = ObservedNetwork(
        teacher,
        taps=objective.askers,
        image_shape=recipe.teacher.image_space.shape,
        frozen=True,
        precision=getattr(torch, spec.precision),
        compiled=device.type == "cuda" if spec.compile == "auto" else spec.compile,
    ).to(device)
    pixels = PixelRange(recipe.teacher.image_space, device)
    setting = Setting(
        judge=Judge(teacher=observed, objective=objective, pixels=pixels, student=student),
        space=recipe.teacher.image_space,
        targets=targets,
        augment=build_augmentations(spec.augment, where="synthesis.augment"),
        device=device,
    )
    return SYNTHESIZERS.build(spec.synthesizer, spec.options, setting, where="synthesis")
