"""The user's mistakes, found before any work."""

from __future__ import annotations

import torch

from raydfkd.config.recipe import Recipe
from raydfkd.devices import pick_device
from raydfkd.distillation.criteria import CRITERIA
from raydfkd.errors import RecipeError
from raydfkd.images.augment import build_augmentations
from raydfkd.images.real_data import RealData, open_real_data
from raydfkd.job import digest_of, transfer_set_of
from raydfkd.networks.build import build_network, count_parameters
from raydfkd.networks.weights import load_teacher, load_weights, weights_exist
from raydfkd.runner.teach import check_teacher
from raydfkd.store.store import Store
from raydfkd.synthesis.build import build_student, build_synthesizer


def check(recipe: Recipe) -> RealData | None:
    """Find the user's mistakes before any work; writes nothing but probes, and removes those.

    Builds every part of the run once, on the CPU, with an untrained teacher.

    Raises:
        RecipeError: with key, value and remedy.
    """
    teacher = build_network(recipe.teacher, recipe.teacher, where="teacher", seed=0)
    cpu = torch.device("cpu")
    build_synthesizer(recipe, teacher, cpu, build_student(recipe, lambda _: None, cpu))
    data = None
    if recipe.real_data is not None:
        data = open_real_data(recipe.real_data, recipe.teacher.image_space, recipe.teacher.classes)
    network = build_network(recipe.student, recipe.teacher, where="student", seed=0)
    criterion = recipe.distill.criterion
    CRITERIA.build(criterion.kind, criterion.options, where="distill.criterion")
    build_augmentations(recipe.distill.augment, where="distill.augment")
    if not count_parameters(network):
        raise RecipeError(f"student.network {recipe.student.network} has no weights to train; give another")
    pick_device(recipe.runtime.device)
    Store(recipe.run_dir).probe("run_dir")
    transfer_set_of(recipe, digest="").store.probe()
    if weights_exist(recipe.teacher.weights, where="teacher.weights"):
        teacher, weights = load_teacher(recipe)
        transfer_set_of(recipe, digest_of(recipe, weights)).check()
    elif recipe.teacher.train is None:
        load_weights(teacher, recipe.teacher.weights, where="teacher.weights")
    else:
        check_teacher(recipe)
    return data
