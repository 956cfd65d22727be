"""Teacher, student, judge and synthesizer put together as a recipe says."""

from __future__ import annotations

import torch
from torch import nn

from raydfkd.distill.published import PublishedStudent, Source
from raydfkd.images import PixelRange
from raydfkd.losses.objective import TERMS, build_objective
from raydfkd.networks import build_network, load_weights
from raydfkd.observed import Need, ObservedNetwork
from raydfkd.recipe import Recipe
from raydfkd.registry import RecipeError
from raydfkd.schedule import derive_seed
from raydfkd.synthesis.augment import build_augmentations
from raydfkd.synthesis.synthesizer import SYNTHESIZERS, Judge, Setting, StudentFeed, Synthesizer
from raydfkd.synthesis.targets import TARGETS


def load_teacher(recipe: Recipe) -> tuple[nn.Module, str]:
    """The recipe's teacher with its weights, and their SHA-256."""
    seed = derive_seed(recipe.seed, "teacher")
    teacher = build_network(recipe.teacher, recipe.teacher, where="teacher", seed=seed)
    return teacher, load_weights(teacher, recipe.teacher.weights, where="teacher.weights")


def asks_student(recipe: Recipe) -> bool:
    """Whether a term of the recipe's objective asks the student."""
    return any(
        Need.STUDENT in TERMS.get(term.term, where=f"synthesis.objective[{index}]").needs  # type: ignore[attr-defined]
        for index, term in enumerate(recipe.synthesis.objective)
    )


def digest_of(recipe: Recipe, weights_sha256: str) -> str:
    """Digest of all that the recipe's images depend on."""
    return recipe.digest(weights_sha256, is_against_student=asks_student(recipe))


def build_student(recipe: Recipe, source: Source, device: torch.device) -> PublishedStudent | None:
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
    return PublishedStudent(
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
        taps=objective.needs,
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
