"""Short heats of several methods on one teacher, judged without a real image: the one to spend the budget on."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from raydfkd.config.recipe import Recipe
from raydfkd.devices import pick_device
from raydfkd.errors import RecipeError, one_line
from raydfkd.networks.teacher import open_teacher
from raydfkd.runner.budget import run_within
from raydfkd.runner.estimate import Estimate, midst, packaged_calibration, weighed
from raydfkd.runner.evidence import Evidence
from raydfkd.runner.run import saved_student

PORTFOLIO = (
    *("nayer", "nayer_procedural", "procedural", "renewed_procedural"),
    *("renewed_generator", "renewed_generator_logits", "deepinversion", "deepdream"),
)
"""Methods that are unlike each other, each the best of some teacher; those that do not suit one are left out."""
SHORTEST = 5.0
"""Device-seconds below which a heat says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heat:
    """What a method came to in one round."""

    method: str
    round: int
    seconds: float
    """Device-seconds for synthesis and student."""
    midst: float
    """What the evidence comes to, see ``runner.estimate``: heats of one teacher are compared by it. 0 of a failure."""
    estimate: Estimate
    images: int
    student_steps: int


def rounds_of(methods: int, seconds: float) -> list[tuple[int, float]]:
    """Contestants of each round and device-seconds of each: successive halving (Jamieson & Talwalkar 2016).

    All rounds take the same time together; half of the contestants go on, and two meet in the last.

    Raises:
        RecipeError: there is too little time.
    """
    rounds = max(1, math.ceil(math.log2(methods)))
    found = []
    for number in range(rounds):
        contestants = math.ceil(methods / 2**number)
        found.append((contestants, seconds / rounds / contestants))
    if found[0][1] < SHORTEST:
        least = SHORTEST * methods * rounds
        raise RecipeError(
            f"--budget is {seconds:g} s, which leaves {found[0][1]:.1f} s to each of {methods} methods; "
            f"give {least:g}s or fewer methods"
        )
    return found


def heats(recipes: Mapping[str, Recipe], seconds: float, *, told: Callable[[Heat], None] = lambda _: None) -> str:
    """Run the methods against each other; returns the best.

    Args:
        recipes: a recipe for each method, with the same teacher and student.
        seconds: device-seconds for all heats; the evidence takes some more, once.
        told: of each heat as it ends.

    Raises:
        RecipeError: the teacher has no weights yet, too little time, or every method came to nothing.
    """
    plan = rounds_of(len(recipes), seconds)
    any_recipe = next(iter(recipes.values()))
    teacher = open_teacher(any_recipe).module.to(pick_device(any_recipe.runtime.device))
    evidence = Evidence(any_recipe, teacher)
    left = list(recipes)
    for number, (contestants, each) in enumerate(plan, start=1):
        ran = []
        for method in left[:contestants]:
            heat = _heat(method, recipes[method], number, each, evidence)
            told(heat)
            ran.append(heat)
        ran.sort(key=lambda heat: -heat.midst)
        left = [heat.method for heat in ran if heat.midst > 0]
        if not left:
            raise RecipeError(f"every method came to nothing: {ran[0].estimate.words}")
    return left[0]


def _heat(method: str, recipe: Recipe, number: int, seconds: float, evidence: Evidence) -> Heat:
    with tempfile.TemporaryDirectory() as folder:
        transfer_set = recipe.transfer_set.model_copy(update={"uri": f"{folder}/transfer_set"})
        recipe = recipe.model_copy(update={"run_dir": folder, "transfer_set": transfer_set})
        try:
            outcome = run_within(recipe, seconds)
        except RecipeError as error:
            return Heat(
                method=method,
                round=number,
                seconds=seconds,
                midst=0.0,
                estimate=Estimate.unknown(one_line(error)),
                images=0,
                student_steps=0,
            )
        student = saved_student(recipe, outcome.student)
    found = evidence.of(student.to(pick_device(recipe.runtime.device)))
    classes = recipe.teacher.classes
    return Heat(
        method=method,
        round=number,
        seconds=outcome.seconds,
        midst=midst(found, classes),
        estimate=weighed(packaged_calibration(), found, classes),
        images=outcome.images,
        student_steps=outcome.student_steps,
    )
