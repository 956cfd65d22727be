"""Judging a student, and the images that it was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from raydfkd.config.recipe import Recipe
from raydfkd.data.shards import StoredRows
from raydfkd.devices import pick_device
from raydfkd.distillation.evaluate import judge, predict
from raydfkd.errors import RecipeError
from raydfkd.images.pixels import PixelRange
from raydfkd.images.real_data import RealData, Split
from raydfkd.job import Job
from raydfkd.networks.build import count_parameters
from raydfkd.networks.teacher import Teacher
from raydfkd.runner.view import SetView
from raydfkd.synthesis.build import has_targets

SAMPLE = 5000
"""Synthetic images that are looked at."""
HELD_OUT = "synthetic images that were held out"
TRAINED_ON = "synthetic images that it was trained on"


def judge_student(
    job: Job, teacher: Teacher, student: nn.Module, view: SetView, data: RealData | None, *, split: Split = "test"
) -> dict[str, Any]:
    """Top-1 of teacher and student on real images where there are some, and on what they agree; as the report has it.

    ``judged_on`` names the images: real ones and their split, synthetic ones that were held out from training, or,
    where nothing could be held out, those that the student was trained on.

    Raises:
        RecipeError: there is no image to judge on.
    """
    device = pick_device(job.recipe.runtime.driver_device)
    labels: Tensor | None = None
    if data is not None:
        real, judged_on = data.load(split), f"real {data_name(job.recipe)} {split} images"
        images, labels = real.images, real.labels
    else:
        images, judged_on = _synthetic(job, view)
    pixels = PixelRange(job.recipe.teacher.image_space, device)
    networks = [network.to(device) for network in (student, teacher.module)]
    answers = [predict(network, images, pixels) for network in networks]
    found = dict(judge(answers[0], answers[1], labels))
    return {
        "teacher": {"top1": found.get("teacher.top1"), "parameters": count_parameters(teacher.module)},
        "student": {"top1": found.get("student.top1"), "parameters": count_parameters(student)},
        "agreement": found["agreement"],
        "judged_on": judged_on,
        "judged_images": len(images),
    }


def data_name(recipe: Recipe) -> str:
    """The name of the real data set."""
    return "" if recipe.real_data is None else recipe.real_data.kind


def _synthetic(job: Job, view: SetView) -> tuple[Tensor, str]:
    for units, name in ((job.held_out, HELD_OUT), (None, TRAINED_ON)):
        rows = view.sample(SAMPLE, units) if units is None or units else None
        if rows is not None:
            return rows.images, name
    raise RecipeError(f"transfer_set.uri is {job.recipe.transfer_set.uri}: there is no image yet; synthesize first")


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """The teacher's answers to the synthetic images, which tell whether synthesis has worked at all."""

    intended: float | None
    """Share of images in which the teacher finds the class that they were made for; None without targets."""
    answered: int
    """Classes that it finds in any image."""
    classes: int
    """Classes that there should be."""

    @property
    def warnings(self) -> list[str]:
        """Faults of the images, in one line each."""
        chance = 1 / self.classes
        found = []
        if self.intended is not None and self.intended < chance + 0.25 * (1 - chance):
            found.append(
                f"the teacher finds the intended class in only {self.intended:.0%} of the synthetic images (chance is "
                f"{chance:.0%}): synthesis has not worked; check image_space.mean and std, then steps and objective"
            )
        if self.answered < self.classes / 2:
            found.append(
                f"the teacher finds only {self.answered} of {self.classes} classes in the synthetic images, so the "
                "student can hardly know the others"
            )
        return found


def look_at_images(job: Job, view: SetView) -> Look | None:
    """Count the classes that stored logits find in a sample of the set; None where the set is empty."""
    rows: StoredRows | None = view.sample(SAMPLE)
    if rows is None:
        return None
    answers = rows.teacher_logits.float().argmax(1)
    return Look(
        intended=float((answers == rows.labels).float().mean()) if has_targets(job.recipe) else None,
        answered=len(answers.unique()),
        classes=len(job.recipe.classes),
    )
