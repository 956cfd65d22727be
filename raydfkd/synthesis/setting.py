"""What a recipe's synthesizer is supplied with: judge, targets, augmentations, put together and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from raydfkd.config.recipe import Recipe
from raydfkd.devices import cpu_threads, dtype_of
from raydfkd.errors import RecipeError
from raydfkd.images.augment import build_augmentations
from raydfkd.images.picture_folder import PictureFolder, pictures_of
from raydfkd.images.pixels import PixelRange
from raydfkd.losses.objective import Objective, build_objective
from raydfkd.networks.batchnorm import LayerMoments
from raydfkd.networks.embeddings import embeddings_of
from raydfkd.networks.inside import TeacherInside
from raydfkd.networks.observed import MOMENTS, Need, ObservedNetwork
from raydfkd.seeds import rng_from
from raydfkd.synthesis.judge import Judge, StudentFeed
from raydfkd.synthesis.start import PictureStart
from raydfkd.synthesis.synthesizer import Setting, is_optimised, not_offered, offers_of, starts_from_pictures
from raydfkd.synthesis.targets import TARGETS, TargetSampler

MEASURED_AT_ONCE = 32
"""Pictures whose statistics are taken in one pass through the teacher; another number is another last bit."""


def build_setting(
    recipe: Recipe,
    teacher: nn.Module,
    device: torch.device,
    student: StudentFeed | None = None,
    *,
    is_trial: bool = False,
) -> Setting:
    """Everything that the recipe's synthesizer is supplied with, with the ``student`` that its objective may ask.

    One that is built for a trial, to find mistakes, takes statistics of two of the recipe's pictures only.

    Raises:
        RecipeError: anything in ``synthesis`` that is unknown, of the wrong type or does not suit the teacher.
    """
    spec = recipe.synthesis
    pictures = pictures_of(recipe)
    inside = TeacherInside(teacher, recipe.teacher.image_space.shape, device)
    targets = TARGETS.build(spec.targets.kind, spec.targets.options, inside, where="synthesis.targets")
    objective = _objective(recipe, targets, has_student=student is not None).to(device)
    _refuse_idle_pictures(recipe, objective)
    _refuse_idle_objective(recipe)
    start = None
    if spec.start is not None:
        start = PictureStart(images=pictures["synthesis.start.images"].images, noise=spec.start.noise)
    return Setting(
        judge=_judge(recipe, teacher, device, objective, pictures, student, is_trial=is_trial),
        space=recipe.made_space,
        targets=targets,
        classes=recipe.teacher.classes,
        augment=build_augmentations(
            spec.augment,
            where="synthesis.augment",
            label_reader=objective.label_reader(takes_mixed=False),
            mixed_label_reader=objective.label_reader(takes_mixed=True),
        ),
        device=device,
        embeddings=embeddings_of(recipe),
        start=start,
    )


def is_compiled(recipe: Recipe, device: torch.device) -> bool:
    """Whether networks are compiled: as ``synthesis.compile`` says, with auto on CUDA only."""
    wanted = recipe.synthesis.compile
    return device.type == "cuda" if wanted == "auto" else wanted


def _objective(recipe: Recipe, targets: TargetSampler, *, has_student: bool) -> Objective:
    spec = recipe.synthesis
    if not targets.is_conditional and len(recipe.classes) < recipe.teacher.classes:
        raise RecipeError(
            f"transfer_set.classes names {len(recipe.classes)} of the teacher's {recipe.teacher.classes} classes, but "
            f"with synthesis.targets {spec.targets.kind} images are of any; use classes: all, or targets that have "
            "labels, such as balanced"
        )
    return build_objective(
        spec.objective,
        has_targets=targets.is_conditional,
        offers=offers_of(spec.synthesizer, where="synthesis") | ({Need.STUDENT} if has_student else set()),
        absent={
            Need.STUDENT: "but none is trained beside this synthesis; drop the term",
            Need.LATENTS: not_offered(spec.synthesizer, Need.LATENTS),
        },
    )


def _judge(
    recipe: Recipe,
    teacher: nn.Module,
    device: torch.device,
    objective: Objective,
    pictures: Mapping[str, PictureFolder],
    student: StudentFeed | None,
    *,
    is_trial: bool,
) -> Judge:
    spec, space = recipe.synthesis, recipe.teacher.image_space
    observed = ObservedNetwork(
        teacher,
        taps=objective.askers,
        image_shape=space.shape,
        frozen=True,
        statistics="stored" if spec.statistics is None else "measured",
        precision=dtype_of(spec.precision, device),
        compiled=is_compiled(recipe, device),
    ).to(device)
    if objective.looks_first:
        with torch.no_grad(), cpu_threads(spec.threads):
            objective.prepare(observed(torch.randn(2, *space.shape, generator=rng_from(0)).to(device)))
        objective.to(device)
    class_statistics: tuple[LayerMoments, ...] = ()
    if spec.statistics is not None:
        found = pictures["synthesis.statistics"]
        class_statistics = _measure(recipe, found, observed, objective, device, is_trial=is_trial)
    return Judge(
        teacher=observed,
        objective=objective,
        pixels=PixelRange(space, device, made=recipe.made_space),
        student=student,
        class_statistics=class_statistics,
    )


def _measure(
    recipe: Recipe,
    pictures: PictureFolder,
    observed: ObservedNetwork,
    objective: Objective,
    device: torch.device,
    *,
    is_trial: bool,
) -> tuple[LayerMoments, ...]:
    """Measure the pictures; returns the moments of each class [K, C] in each layer, where the recipe wants them."""
    spec = recipe.synthesis
    where = "synthesis.statistics"
    by_class: list[Tensor] = []
    if spec.statistics_per_class:
        if Need.CLASS_MOMENTS not in objective.needs:
            raise RecipeError(
                "synthesis.statistics_per_class is true, but no term compares moments of each class; add bn_moments "
                "with scope: class, or drop it"
            )
        by_class = pictures.by_class(recipe.class_names, where=where)
    whole = PixelRange(recipe.teacher.image_space, device)  # pictures are of the teacher's size
    found = []
    with cpu_threads(spec.threads):
        for images in (*by_class, pictures.images):
            batches = images[: 2 if is_trial else None].split(MEASURED_AT_ONCE)
            observed.measure(whole.from_uint8(batch.to(device)) for batch in batches)
            found.append(observed.measured)
    return tuple(
        replace(
            layers[0],
            running_mean=torch.stack([layer.running_mean for layer in layers]),
            running_var=torch.stack([layer.running_var for layer in layers]),
        )
        for layers in zip(*found[:-1], strict=True)
    )


def _refuse_idle_pictures(recipe: Recipe, objective: Objective) -> None:
    """Refuse pictures that nothing would look at."""
    spec = recipe.synthesis
    if spec.start is not None and not starts_from_pictures(spec.synthesizer, where="synthesis"):
        raise RecipeError(
            f"synthesis.start.images is {spec.start.images!r}, but the synthesizer {spec.synthesizer} does not begin "
            "with images; use pixels or drop start"
        )
    if spec.statistics is not None and not objective.needs.intersection(MOMENTS):
        raise RecipeError(
            f"synthesis.statistics is {spec.statistics!r}, but no term of synthesis.objective compares moments; add "
            "bn_moments or drop statistics"
        )


def _refuse_idle_objective(recipe: Recipe) -> None:
    """Refuse an objective that nothing minimises, and a synthesizer that has none to minimise."""
    spec = recipe.synthesis
    optimises = is_optimised(spec.synthesizer, where="synthesis")
    if optimises and not spec.objective:
        raise RecipeError(f"synthesis.objective is empty, but {spec.synthesizer} minimises it; give terms")
    if not optimises and spec.objective:
        raise RecipeError(
            f"synthesis.objective has {spec.objective[0].name}, but {spec.synthesizer} optimises nothing; drop it"
        )
    if spec.embeddings is not None and not spec.options.get("conditional"):
        raise RecipeError(
            f"synthesis.embeddings is {spec.embeddings!r}, but no generator is told its class; use synthesizer "
            "generator with conditional: true, or drop it"
        )
