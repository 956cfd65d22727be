"""The student as its training finds it."""

from __future__ import annotations

from torch import nn

from raydfkd.config.recipe import Recipe
from raydfkd.networks.build import PRUNED_TEACHER, build_network, prune_teacher
from raydfkd.seeds import derive_seed


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
    return student
