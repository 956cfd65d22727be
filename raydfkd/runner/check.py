"""Finds the user's mistakes before any work; the networks and data that it builds are handed on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from raydfkd.config.recipe import Recipe
from raydfkd.data.sources import SOURCES, Feed, LiveGenerator
from raydfkd.devices import pick_device
from raydfkd.distillation.loss import StudentLoss, check_layers
from raydfkd.errors import MissingError, Mistakes, RecipeError
from raydfkd.images.augment import build_augmentations
from raydfkd.images.picture_folder import PictureFolder, not_data_free, pictures_of
from raydfkd.images.real_data import RealData
from raydfkd.job import dependencies_of, transfer_set_of
from raydfkd.networks.build import build_network
from raydfkd.networks.embeddings import outside_knowledge
from raydfkd.networks.hardness import hardness
from raydfkd.networks.probe import probe_student, probe_teacher
from raydfkd.networks.teacher import Teacher, build_teacher, open_teacher
from raydfkd.networks.verifier import Verifier, open_verifier
from raydfkd.networks.weights import weights_exist
from raydfkd.runner.evidence import check_evidence
from raydfkd.runner.teach import check_teaching, judging_data
from raydfkd.store.store import Store
from raydfkd.synthesis.build import build_student, build_synthesizer, is_live, live_generator


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A recipe without a mistake that can be found before work begins."""

    recipe: Recipe
    network: nn.Module
    """The teacher's network; its weights are fresh where there is no ``teacher``."""
    student: nn.Module
    """The student before training, with weights of no particular seed."""
    teacher: Teacher | None
    """The trained teacher; None where it has to be taught first."""
    data: RealData | None
    """Real images that judge the student, and train the teacher where it has to be taught."""
    notes: tuple[str, ...]
    """Things that the user should know of teacher, student and real pictures, a line each."""
    not_data_free: str | None = None
    """Real pictures that the synthesis reads, and what for; None where it reads none."""
    verifier: Verifier | None = None
    """Another network that judges the images; None where the recipe has none, or it is not here."""
    not_verified: str | None = None
    """Why the images are not verified although the recipe has a verifier."""


def check(recipe: Recipe, *, writes_run: bool = True, writes_set: bool = True) -> Prepared:
    """Find the user's mistakes before any work; writes nothing but probes, and removes those.

    Builds every part of the run once, on the CPU.

    Args:
        recipe: what is to be done.
        writes_run: whether run_dir is going to be written to.
        writes_set: whether the transfer set is.

    Raises:
        RecipeError: with key, value and remedy.
    """
    mistakes = Mistakes()
    data, teacher, network, student = None, None, None, None
    notes: list[str] = []
    with mistakes.gathered():
        network = build_teacher(recipe)
    with mistakes.gathered():
        _ = recipe.class_names  # or a run would find a wrong file of names when it writes its report
    with mistakes.gathered():
        if recipe.real_data is not None:
            data = judging_data(recipe)
            notes += data.notes
    with mistakes.gathered():
        student = build_network(recipe.student, recipe.teacher, where="student", seed=0)
        notes += probe_student(student, recipe.teacher, recipe.distill.batch_size // recipe.distill.accumulate)
    with mistakes.gathered():
        _check_training(recipe)
    _check_surroundings(recipe, mistakes, writes_run=writes_run, writes_set=writes_set)
    if network is not None and student is not None:
        with mistakes.gathered():
            check_synthesis(recipe, network, student)
        with mistakes.gathered():
            check_layers(recipe.distill, student, network, recipe.teacher.image_space.shape)
        with mistakes.gathered():
            _check_selection(recipe, network)
    if network is not None:
        with mistakes.gathered():
            if recipe.teacher.train is None or weights_exist(recipe.teacher.weights, where="teacher.weights"):
                teacher = open_teacher(recipe, network, say=notes.append)
                notes += [*probe_teacher(teacher.module, recipe.teacher), *hardness(teacher.module, recipe.teacher)]
            else:
                check_teaching(recipe)
    verifier, not_verified = _verifier(recipe, teacher, mistakes)
    pictures = _read_pictures(recipe, mistakes)
    mistakes.complain()
    assert network is not None
    assert student is not None
    if teacher is not None:
        transfer_set_of(recipe, dependencies_of(recipe, teacher)).check()
    return Prepared(
        recipe=recipe,
        network=network,
        student=student,
        teacher=teacher,
        data=data,
        notes=(
            *notes,
            *filter(None, [not_verified]),
            *(note for key, found in pictures.items() for note in found.notes(key)),
        ),
        not_data_free=" and ".join(filter(None, (not_data_free(pictures), outside_knowledge(recipe)))) or None,
        verifier=verifier,
        not_verified=not_verified,
    )


def _verifier(recipe: Recipe, teacher: Teacher | None, mistakes: Mistakes) -> tuple[Verifier | None, str | None]:
    """The recipe's verifier, or a line on why it is not here; neither where there is none, or a mistake in it."""
    spec = recipe.verifier
    if spec is None:
        return None, None
    with mistakes.gathered():
        try:
            verifier = open_verifier(recipe, spec)
        except MissingError as missing:
            return None, f"the images are not verified: {missing}"
        if teacher is None or verifier.sha256 != teacher.sha256:
            return verifier, None
        raise RecipeError(
            f"verifier.weights is {spec.weights!r}, the teacher's own weights, and a teacher praises what it has made; "
            "give a network that was trained by itself, or drop verifier"
        )
    return None, None


def _check_surroundings(recipe: Recipe, mistakes: Mistakes, *, writes_run: bool, writes_set: bool) -> None:
    with mistakes.gathered():
        pick_device(recipe.runtime.driver_device)
    with mistakes.gathered():
        if writes_run:
            Store(recipe.run_dir).probe("run_dir", once=False)
    with mistakes.gathered():
        if writes_set:
            transfer_set_of(recipe, {}).store.probe()


def check_synthesis(recipe: Recipe, teacher: nn.Module, student: nn.Module) -> None:
    """Build the recipe's synthesis once, on the CPU, as it will be in the run.

    Raises:
        RecipeError: it is mistaken, or does not suit the teacher.
    """
    cpu = torch.device("cpu")
    if is_live(recipe):
        _check_source(recipe, lambda steps: live_generator(recipe, teacher, student, cpu, steps=steps, is_trial=True))
        if recipe.transfer_set.images_per_class or recipe.rounds > 1:
            raise RecipeError(
                "distill.source is live, which makes its own images, but transfer_set.images_per_class is "
                f"{recipe.transfer_set.images_per_class} and rounds {recipe.rounds}; leave both out"
            )
        return
    if not recipe.transfer_set.images_per_class:
        raise RecipeError("transfer_set.images_per_class is missing; say how many images to make of each class")
    build_synthesizer(recipe, teacher, cpu, build_student(recipe, teacher, lambda _: None, cpu), is_trial=True)


def _check_selection(recipe: Recipe, teacher: nn.Module) -> None:
    if recipe.distill.select == "last":
        return
    try:
        check_evidence(recipe, teacher)
    except RecipeError as error:
        raise RecipeError(
            f"distill.select is estimate, for which a generator has to suit the teacher ({error}); use last"
        ) from None


def _read_pictures(recipe: Recipe, mistakes: Mistakes) -> Mapping[str, PictureFolder]:
    with mistakes.gathered():
        return pictures_of(recipe)
    return {}


def _check_training(recipe: Recipe) -> None:
    loss = StudentLoss(recipe.distill)
    build_augmentations(
        recipe.distill.augment,
        where="distill.augment",
        label_reader=loss.label_reader(takes_mixed=False),
        mixed_label_reader=loss.label_reader(takes_mixed=True),
    )
    if not is_live(recipe):
        _check_source(recipe, None)


def _check_source(recipe: Recipe, generator: Callable[[int], LiveGenerator] | None) -> None:
    source = recipe.distill.source
    feed = Feed(
        transfer_set=transfer_set_of(recipe, {}),
        units=(),
        planned_images=recipe.transfer_set.images_per_class * len(recipe.classes),
        plan="",
        image_bytes=math.prod(recipe.teacher.image_space.shape),
        num_classes=recipe.teacher.classes,
        augment=recipe.distill.augment,
        steps=recipe.distill.steps,
        batch_size=recipe.distill.batch_size,
        seed=0,
        generator=generator,
    )
    SOURCES.build(source.kind, source.options, feed, where="distill.source")
