"""Judge and synthesizer, put together as a recipe says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from raydfkd.config.recipe import Recipe
from raydfkd.data.sources import SOURCES, Ranks
from raydfkd.data.student_versions import Source
from raydfkd.devices import cpu_threads
from raydfkd.errors import RecipeError
from raydfkd.images.augment import build_augmentations
from raydfkd.images.picture_folder import PictureFolder, pictures_of
from raydfkd.images.pixels import PixelRange
from raydfkd.job import asks_student
from raydfkd.losses.objective import Objective, build_objective, terms_that_need
from raydfkd.networks.batchnorm import LayerMoments
from raydfkd.networks.build import build_network
from raydfkd.networks.embeddings import embeddings_of
from raydfkd.networks.inside import TeacherInside
from raydfkd.networks.observed import MOMENTS, Need, ObservedNetwork
from raydfkd.seeds import derive_seed, rng_from
from raydfkd.synthesis.generator_training import GeneratorTraining
from raydfkd.synthesis.judge import Judge, StudentFeed
from raydfkd.synthesis.selection import SELECTORS, SelectingSynthesizer
from raydfkd.synthesis.start import PictureStart
from raydfkd.synthesis.student_feed import LiveStudentFeed, StoredStudentFeed
from raydfkd.synthesis.synthesizer import (
    SYNTHESIZERS,
    Setting,
    Synthesizer,
    is_optimised,
    not_offered,
    offers_of,
    starts_from_pictures,
)
from raydfkd.synthesis.targets import TARGETS
from raydfkd.units import Request

MEASURED_AT_ONCE = 32
"""Pictures whose statistics are taken in one pass through the teacher; another number is another last bit."""


def build_student(recipe: Recipe, source: Source, device: torch.device) -> StoredStudentFeed | None:
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
    seed = derive_seed(recipe.seed, "student")
    return StoredStudentFeed(
        build_network(recipe.student, recipe.teacher, where="student", seed=seed),
        source,
        device=device,
        precision=getattr(torch, spec.precision),
        compiled=_is_compiled(recipe, device),
    )


def build_synthesizer(
    recipe: Recipe,
    teacher: nn.Module,
    device: torch.device,
    student: StudentFeed | None = None,
    *,
    is_trial: bool = False,
) -> Synthesizer:
    """Put judge and synthesizer together as the recipe says, with the ``student`` that its objective may ask.

    One that is built for a trial, to find mistakes, takes statistics of two of the recipe's pictures only.

    Raises:
        RecipeError: anything in ``synthesis`` that is unknown, of the wrong type or does not suit the teacher.
    """
    spec = recipe.synthesis
    setting = build_setting(recipe, teacher, device, student, is_trial=is_trial)
    synthesizer = SYNTHESIZERS.build(spec.synthesizer, spec.options, setting, where="synthesis")
    if spec.select is None:
        return synthesizer
    selector = SELECTORS.build(spec.select.kind, spec.select.options, where="synthesis.select")
    return SelectingSynthesizer(synthesizer, selector, spec.select, is_conditional=setting.targets.is_conditional)


def build_setting(
    recipe: Recipe,
    teacher: nn.Module,
    device: torch.device,
    student: StudentFeed | None = None,
    *,
    is_trial: bool = False,
) -> Setting:
    """Everything that the recipe's synthesizer is supplied with; arguments and errors of ``build_synthesizer``."""
    spec = recipe.synthesis
    pictures = pictures_of(recipe)
    inside = TeacherInside(teacher, recipe.teacher.image_space.shape, device)
    targets = TARGETS.build(spec.targets.kind, spec.targets.options, inside, where="synthesis.targets")
    objective = build_objective(
        spec.objective,
        has_targets=targets.is_conditional,
        offers=offers_of(spec.synthesizer, where="synthesis") | ({Need.STUDENT} if student is not None else set()),
        absent={
            Need.STUDENT: "but none is trained beside this synthesis; drop the term",
            Need.LATENTS: not_offered(spec.synthesizer, Need.LATENTS),
        },
    ).to(device)
    if not targets.is_conditional and len(recipe.classes) < recipe.teacher.classes:
        raise RecipeError(
            f"transfer_set.classes names {len(recipe.classes)} of the teacher's {recipe.teacher.classes} classes, but "
            f"with synthesis.targets {spec.targets.kind} images are of any; use classes: all, or targets that have "
            "labels, such as balanced"
        )
    _refuse_idle_pictures(recipe, objective)
    _refuse_idle_objective(recipe)
    observed = ObservedNetwork(
        teacher,
        taps=objective.askers,
        image_shape=recipe.teacher.image_space.shape,
        frozen=True,
        statistics="stored" if spec.statistics is None else "measured",
        precision=getattr(torch, spec.precision),
        compiled=_is_compiled(recipe, device),
    ).to(device)
    if objective.looks_first:
        with torch.no_grad(), cpu_threads(spec.threads):
            images = torch.randn(2, *recipe.teacher.image_space.shape, generator=rng_from(0))
            objective.prepare(observed(images.to(device)))
        objective.to(device)
    pixels = PixelRange(recipe.teacher.image_space, device, made=recipe.made_space)
    class_statistics: tuple[LayerMoments, ...] = ()
    if spec.statistics is not None:
        found = pictures["synthesis.statistics"]
        class_statistics = _measure(recipe, found, observed, objective, device, is_trial=is_trial)
    return Setting(
        judge=Judge(
            teacher=observed, objective=objective, pixels=pixels, student=student, class_statistics=class_statistics
        ),
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
        start=None
        if spec.start is None
        else PictureStart(images=pictures["synthesis.start.images"].images, noise=spec.start.noise),
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


def _is_compiled(recipe: Recipe, device: torch.device) -> bool:
    """Whether networks are compiled: as ``synthesis.compile`` says, with auto on CUDA only."""
    wanted = recipe.synthesis.compile
    return device.type == "cuda" if wanted == "auto" else wanted


def has_targets(recipe: Recipe) -> bool:
    """Whether images are made for a class each."""
    spec = recipe.synthesis.targets
    return bool(getattr(TARGETS.get(spec.kind, where="synthesis.targets"), "is_conditional", False))


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
