"""Teachers of many kinds, each with the recipe that `init` writes for it: whether what holds for some holds for all."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from raydfkd.bench.controls import NOISE, REAL
from raydfkd.bench.engine import code_digest
from raydfkd.bench.quality import Cell, Result, bench_quality, spread, taught
from raydfkd.config.load import load_recipe
from raydfkd.config.recipe import Recipe
from raydfkd.errors import RecipeError, did_you_mean
from raydfkd.images.real_data import Split
from raydfkd.networks.scout import scout
from raydfkd.runner.constants import tempered
from raydfkd.runner.draft import Draft
from raydfkd.runner.suits import why_not

CHOSEN_ON = (
    *("digits-convnet", "digits-lenet", "fashion-lenet", "fashion-resnet"),
    *("fashion-groupnorm", "mnist-plain", "mnist-batchnorm"),
    *("fashion-mlp", "mnist-mlp", "letters", "fashion-mobilenet"),
)
"""Teachers on which methods may be chosen."""
JUDGED_ON = (
    *("fashion-vgg", "fashion-vit"),
    *("tinted-resnet", "tinted-lenet", "garment-pair"),
)
"""Teachers that say whether that holds; nothing is chosen on them."""
TEACHERS = (*CHOSEN_ON, *JUDGED_ON)
BATCHES_PER_UNIT, UNITS_PER_ROUND, STUDENT_STEPS = 6, 2, 4000
"""Of a recipe that is run by the clock: what a unit holds counts, how many there are does not."""

Student = Literal["half", "chosen"]
"""``half`` is a smaller network of the teacher's kind, as its page says; ``chosen`` the one that init takes."""
STUDENTS: tuple[Student, ...] = ("half", "chosen")


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """What is measured: some of the teachers."""

    teachers: tuple[str, ...] = TEACHERS
    budget_s: float
    """Device-seconds for synthesis and student together."""
    seeds: tuple[int, ...]
    split: Split
    students: tuple[Student, ...] = STUDENTS
    controls: bool = True
    """Whether real images and noise are measured too, on the first of ``students``."""
    methods: tuple[str, ...] = ()
    """Packaged methods that are measured beside the one that init chooses; those that do not suit have no row."""
    overrides: tuple[str, ...] = ()
    """Changes to every recipe: for trials."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A result, and what it is one of."""

    teacher: str
    student: Student
    method: str
    """The one that init chose, another, or a control."""
    is_chosen: bool
    """Whether init chose it."""
    result: Result

    @property
    def share(self) -> float:
        """The student's accuracy over the teacher's."""
        return self.result.student_top1 / self.result.teacher_top1


def visit_zoo(
    visit: Visit, folder: Path, *, at_once: int = 1, told: Callable[[Row], None] = lambda _: None
) -> list[Row]:
    """Measure what ``folder`` has no result of yet.

    Args:
        visit: what is measured.
        folder: results, teachers and the recipes that were written for them; the same folder resumes.
        at_once: processes of one thread each.
        told: of each result as it comes.

    Raises:
        RecipeError: no such teacher, or its data are not there.
    """
    for name in visit.teachers:
        if name not in TEACHERS:
            raise RecipeError(f"{name} is not in the zoo; {did_you_mean(name, TEACHERS)}")
    cells: dict[Cell, tuple[str, Student, str]] = {}
    for name in visit.teachers:
        recipe = taught(load_recipe(name), folder)
        for student in visit.students:
            page, chosen = write_recipe(recipe, name, student, visit.budget_s, folder)
            for cell in _cells(recipe, page, visit, is_first=student == visit.students[0]):
                if cell.method in (None, REAL) or not why_not(cell.load()):
                    cells[cell] = (name, student, chosen)
    rows = []
    by_command = {cell.command: known for cell, known in cells.items()}
    for result in bench_quality(list(cells), folder, at_once=at_once):
        name, student, chosen = by_command[result.command]
        is_chosen = result.method is None
        method = chosen if result.method is None else result.method
        row = Row(teacher=name, student=student, method=method, is_chosen=is_chosen, result=result)
        told(row)
        rows.append(row)
    return rows


def write_recipe(recipe: Recipe, name: str, student: Student, budget: float, folder: Path) -> tuple[Path, str]:
    """Write the recipe that init writes for the teacher; returns its file and the method that it begins with.

    Args:
        recipe: the teacher's page.
        name: the teacher's.
        student: that it is for.
        budget: seconds; rounds, arithmetic and the student that init chooses follow from it and from this machine.
        folder: where it is written, unless there is one already.
    """
    teacher = recipe.teacher
    space = teacher.image_space.model_dump(mode="json")
    found = scout(
        teacher.network,
        options=teacher.options,
        weights=teacher.weights,
        given={"classes": teacher.classes, "image_space": space},
    )
    draft = Draft(
        found=tempered(found),
        name=f"{name}-{student}",
        student=recipe.student.model_dump(mode="json") if student == "half" else {},
        data=None,
        command=f"raydfkd bench zoo {name}",
    )
    path = folder / "recipes" / f"{name}-{student}-{budget:g}s-{code_digest()}.yaml"
    if not path.exists():  # measured again the machine might be another, and nothing would be resumed
        fit = draft.fit(budget, by_clock=True)
        sizes = replace(
            fit.sizes,
            batches_per_unit=BATCHES_PER_UNIT,
            units_per_class=UNITS_PER_ROUND * fit.sizes.rounds,
            student_steps=STUDENT_STEPS,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(fit.draft.page_of(sizes, fit.arithmetic), encoding="utf-8")
    return path, draft.method


def _cells(recipe: Recipe, page: Path, visit: Visit, *, is_first: bool) -> Iterator[Cell]:
    assert recipe.real_data is not None, "every page of the zoo names some"
    real_data = json.dumps(recipe.real_data.model_dump(mode="json"))
    controls = (REAL, NOISE) if visit.controls and is_first else ()
    for method in dict.fromkeys((None, *visit.methods, *controls)):
        for seed in visit.seeds if method is None else visit.seeds[:1]:
            yield Cell(
                recipe=str(page),
                method=method,
                budget_s=visit.budget_s,
                seed=seed,
                split=visit.split,
                overrides=(f"real_data={real_data}", *visit.overrides),
                with_evidence=True,
            )


def to_json(rows: Sequence[Row]) -> str:
    """All rows, one object each in a list."""
    return json.dumps([asdict(row) for row in rows], indent=1)


def markdown(rows: Sequence[Row]) -> str:
    """A row a teacher, then means over each half of the zoo: top-1 in per cent, and shares of the teacher's."""
    students = [student for student in STUDENTS if any(row.student == student for row in rows)]
    lines = [
        "| teacher | method | teacher's | real images | noise | "
        + " | ".join(f"student, {student} | over teacher's" for student in students)
        + " |",
        "|---|---|" + "---|" * (3 + 2 * len(students)),
    ]
    for name in TEACHERS:
        own = [row for row in rows if row.teacher == name]
        if not own:
            continue
        method = next((row.method for row in own if row.is_chosen), "-")
        cells = [f"{100 * own[0].result.teacher_top1:.1f}"]
        for control in (REAL, NOISE):
            cells.append(spread([100 * row.result.student_top1 for row in own if row.method == control], ".1f"))
        for student in students:
            made = [row for row in own if row.is_chosen and row.student == student]
            cells.append(spread([100 * row.result.student_top1 for row in made], ".1f"))
            cells.append(spread([row.share for row in made], ".3f"))
        lines.append(f"| {name} | {method} | {' | '.join(cells)} |")
    for title, half in (("chosen on", CHOSEN_ON), ("judged on", JUDGED_ON)):
        shares = [row.share for row in rows if row.is_chosen and row.teacher in half]
        if shares:
            lines.append(
                f"\nHalf that methods were {title}: mean {statistics.mean(shares):.3f}, least {min(shares):.3f}."
            )
    return "\n".join(lines)
