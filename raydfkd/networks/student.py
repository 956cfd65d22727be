"""The student as its training finds it."""

from __future__ import annotations

import torch
from torch import nn

from raydfkd.config.recipe import Recipe
from raydfkd.config.schema import TeacherSpec
from raydfkd.networks.build import PRUNED_TEACHER, build_network, prune_teacher
from raydfkd.networks.pruned import last_layer
from raydfkd.networks.taps import find_head
from raydfkd.seeds import derive_seed, rng_from


def fresh_student(recipe: Recipe, teacher: nn.Module) -> nn.Module:
    """The student before its training: its weights follow from the recipe's seed, or are the teacher's.

    Args:
        recipe: whose student it is.
        teacher: the trained network, of which a pruned one begins with a part; left as it is.

    Raises:
        RecipeError: the network cannot be built.
    """
    seed = derive_seed(recipe.seed, "student")
    student = build_network(recipe.student, recipe.teacher, where="student", seed=seed)
    if recipe.student.network == PRUNED_TEACHER:
        student.load_state_dict(prune_teacher(recipe.student, teacher, recipe.teacher).state_dict())
        _temper(student, recipe.teacher)
    return student


def _temper(student: nn.Module, teacher: TeacherSpec) -> None:
    """Divide what the student answers as the teacher's logits are divided."""
    if teacher.temperature == 1:
        return
    images = torch.randn(2, *teacher.image_space.shape, generator=rng_from(0))
    head = find_head(student, images)
    # behind a layer whose mean over positions they are, the logits are divided as its outputs
    layer = last_layer(student, images) if head is None else student.get_submodule(head.path)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.div_(teacher.temperature)
