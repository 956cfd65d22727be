"""Judging a student, and the images that it was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from raydfkd.config.recipe import Recipe
from raydfkd.config.schema import ImageSpace
from raydfkd.data.shards import StoredRows
from raydfkd.devices import pick_device
from raydfkd.distillation.evaluate import batch_size, judge
from raydfkd.distillation.metrics import Comparison, Figures
from raydfkd.errors import RecipeError
from raydfkd.images.picture_folder import UnlabelledFolder
from raydfkd.images.pixels import PixelRange
from raydfkd.images.real_data import RealData, Split
from raydfkd.job import Job
from raydfkd.networks.build import count_parameters
from raydfkd.networks.teacher import Teacher
from raydfkd.runner.estimate import estimate
from raydfkd.runner.view import SetView
from raydfkd.synthesis.build import share_with_targets

Batches = Iterable[tuple[Tensor, Tensor | None]]
SAMPLE = 5000
"""Synthetic images that are looked at."""
NAMED = 10
"""Broken pictures that are named, beside their number."""
HELD_OUT = "synthetic images that were held out"
NOTHING = "no image: none is real, and none was held out"


def judge_student(
    job: Job, teacher: Teacher, student: nn.Module, view: SetView, data: RealData | None, *, split: Split = "test"
) -> dict[str, Any]:
    """Figures of teacher and student on real images where there are some, and their agreement, as report.json has it.

    One pass over the images, of which no more are in memory than a batch and some.

    ``judged_on`` names the images: real ones and their split, or synthetic ones that were held out from training; where
    nothing could be held out there are none, and ``agreement`` is None: that on the images that a student learned from
    says nothing. Where there are no real ones, the student has an ``estimate`` of its agreement on them (see
    ``runner.estimate``).

    Raises:
        RecipeError: the data do not have that split, or the set is empty.
    """
    shown = _held_out(job, view) if data is None else _real(job.recipe, data, split)
    found = _judged(job.recipe, teacher, student, shown)
    if data is None:
        found["student"]["estimate"] = estimate(job.recipe, teacher.module, student).as_json()
    return found


def judge_by_pictures(recipe: Recipe, teacher: Teacher, student: nn.Module, folder: UnlabelledFolder) -> dict[str, Any]:
    """Figures as ``judge_student``, of the agreement on pictures that nobody has labelled.

    Raises:
        RecipeError: no picture can be decoded.
    """
    broken = Broken()
    pictures = folder.stream.batches(batch_size(recipe.teacher.image_space), broken.add)
    shown = _Shown(
        batches=((images, None) for images, _ in pictures),
        name=f"pictures without labels in {folder.path}",
        broken=broken,
    )
    found = _judged(recipe, teacher, student, shown)
    if not found["judged_images"]:
        raise RecipeError(f"--pictures is {folder.path!r}: none can be decoded, such as {broken.first[0]}; give others")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """Images that both networks are asked about."""

    batches: Batches
    name: str
    made: ImageSpace | None = None
    """Their space, where it is not the teacher's."""
    data: RealData | None = None
    """The data set that they are of."""
    broken: Broken
    """Those that cannot be decoded; complete after one pass."""


def _judged(recipe: Recipe, teacher: Teacher, student: nn.Module, shown: _Shown) -> dict[str, Any]:
    device = pick_device(recipe.runtime.driver_device)
    found = judge(
        student.to(device),
        teacher.module.to(device),
        shown.batches,
        PixelRange(recipe.teacher.image_space, device, made=shown.made),
        classes=recipe.teacher.classes,
    )
    return {
        "teacher": {**_figures(found.teacher), "parameters": count_parameters(teacher.module)},
        "student": {**_figures(found.student), "parameters": count_parameters(student), "estimate": None},
        "agreement": found.agreement if found.images else None,
        "judged_on": shown.name,
        "judged_images": found.images,
        **_by_class(recipe, found, shown.data),
        "skipped_pictures": asdict(shown.broken),
    }


@dataclass(slots=True)
class Broken:
    """Pictures that cannot be decoded and are left out."""

    count: int = 0
    first: list[str] = field(default_factory=list)
    """Names of the first ones."""

    def add(self, name: str) -> None:
        """Count another one."""
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(name)


def skipped_line(skipped: Mapping[str, Any]) -> list[str]:
    """The line on pictures that cannot be decoded, as the report has them; none where all can."""
    count, first = skipped["count"], skipped["first"]
    if not count:
        return []
    names = ", ".join(first) + (", ..." if count > len(first) else "")
    what = (
        "1 real picture that cannot be decoded is"
        if count == 1
        else f"{count:,} real pictures that cannot be decoded are"
    )
    return [f"{what} left out: {names}"]


def _figures(figures: Figures | None) -> dict[str, Any]:
    """A network's own figures, as the report has them."""
    keys = ("top1", "top5", "ece", "per_class")
    return {key: None if figures is None else getattr(figures, key) for key in keys}


def _by_class(recipe: Recipe, found: Comparison, data: RealData | None) -> dict[str, Any]:
    """What was judged class by class, as the report has it."""
    teacher, student = found.teacher, found.student
    if teacher is None or student is None:
        return {"class_names": None, "images_per_class": None, "confusion": None}
    return {
        "class_names": list(class_names(recipe, data)),
        "images_per_class": student.images_per_class,
        "confusion": {"teacher": teacher.confusion, "student": student.confusion},
    }


def class_names(recipe: Recipe, data: RealData | None) -> tuple[str, ...]:
    """Names of the classes: those of the recipe, else of the real data, else their numbers."""
    return recipe.class_names if data is None or recipe.teacher.class_names is not None else data.class_names


def data_name(recipe: Recipe) -> str:
    """The name of the real data set."""
    return "" if recipe.real_data is None else recipe.real_data.kind


def _real(recipe: Recipe, data: RealData, split: Split) -> _Shown:
    broken = Broken()
    batches = data.load(split).batches(batch_size(recipe.teacher.image_space), broken.add)
    return _Shown(batches=batches, name=f"real {data_name(recipe)} {split} images", data=data, broken=broken)


def _held_out(job: Job, view: SetView) -> _Shown:
    recipe = job.recipe
    if not view.snapshot.images:
        raise RecipeError(f"transfer_set.uri is {recipe.transfer_set.uri}: there is no image yet; synthesize first")
    rows = view.sample(SAMPLE, job.held_out) if job.held_out else None
    if rows is None:
        return _Shown(batches=(), name=NOTHING, made=recipe.made_space, broken=Broken())
    batches = ((images, None) for images in rows.images.split(batch_size(recipe.teacher.image_space)))
    return _Shown(batches=batches, name=HELD_OUT, made=recipe.made_space, broken=Broken())


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
                f"{chance:.0%}): the student learns its answers to images of no class; check image_space.mean and std, "
                "then steps and objective"
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
    share = share_with_targets(job.recipe)
    is_right = float((answers == rows.labels).float().mean())  # which those without a target are by definition
    return Look(
        intended=max(0.0, (is_right - (1 - share)) / share) if share else None,
        answered=len(answers.unique()),
        classes=len(job.recipe.classes),
    )
