"""Student accuracy for a budget of device-seconds, synthesis and training together: what users pick a recipe by."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from raydfkd.config.load import load_recipe
from raydfkd.config.recipe import Recipe
from raydfkd.images.real_data import Split
from raydfkd.store.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run: a recipe, a budget, a seed."""

    recipe: str
    """A file, or the name of a packaged recipe."""
    budget_s: float
    """Device-seconds for synthesis and student training together."""
    seed: int
    split: Split
    """Real images that judge: validation while choosing, test once at the end."""
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Names the result's file; other overrides, another file."""
        changes = hashlib.sha256("\n".join(self.overrides).encode()).hexdigest()[:6] if self.overrides else "plain"
        return f"{Path(self.recipe).stem}-{changes}-{self.budget_s:g}s-seed{self.seed}-{self.split}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of a cell. Accuracies are shares of real images, seconds are device-seconds."""

    recipe: str
    budget_s: float
    seed: int
    split: Split
    student_top1: float
    teacher_top1: float
    agreement: float
    """Share of real images that student and teacher put in the same class."""
    seconds: float
    synthesis_seconds: float
    images: int
    student_steps: int
    device: str
    command: str
    """Repeats this cell alone."""


def bench_quality(cells: Sequence[Cell], folder: Path, *, at_once: int = 1) -> Iterator[Result]:
    """Run the cells that ``folder`` has no result of yet, each in a fresh process of one CPU thread; yield all.

    Args:
        cells: what to measure.
        folder: results, and the teachers that the recipes train; the same folder goes on where it was stopped.
        at_once: processes; more than one only where each has a core of its own.
    """
    store = Store(str(folder))
    waiting = []
    for cell in cells:
        if store.exists(f"{cell.name}.json"):
            yield Result(**json.loads(store.get(f"{cell.name}.json")))
        else:
            waiting.append(cell)
    if not waiting:
        return
    for recipe, overrides in dict.fromkeys((cell.recipe, cell.overrides) for cell in waiting):
        _teach(load_recipe(recipe, list(overrides)), folder)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes to come; in this one torch has its threads already
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(at_once, mp_context=context, max_tasks_per_child=1) as pool:
        running = {pool.submit(measure, cell, folder): cell for cell in waiting}
        for done in as_completed(running):
            result = done.result()
            store.put(f"{running[done].name}.json", json.dumps(asdict(result), indent=1).encode())
            yield result


def _with_shared_teacher(recipe: Recipe, folder: Path) -> Recipe:
    """A recipe that trains its teacher shares it with all seeds and budgets, and with recipes that teach the same."""
    if recipe.teacher.train is None:
        return recipe
    made_of = recipe.teacher.model_dump_json(exclude={"weights"}) + str(recipe.real_data)
    name = f"{recipe.teacher.network}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}.safetensors"
    teacher = recipe.teacher.model_copy(update={"weights": str(folder / "teachers" / name)})
    return recipe.model_copy(update={"teacher": teacher})


def _teach(recipe: Recipe, folder: Path) -> None:
    from rich.console import Console

    from raydfkd.networks.weights import weights_exist
    from raydfkd.runner.run import listening
    from raydfkd.runner.teach import teach

    if recipe.teacher.train is None:
        return
    recipe = _with_shared_teacher(recipe, folder).model_copy(update={"run_dir": str(folder / "teachers")})
    if not weights_exist(recipe.teacher.weights, where="teacher.weights"):
        with listening(recipe, Console(stderr=True)) as events:
            teach(recipe, events)


def measure(cell: Cell, folder: Path) -> Result:
    """Run one cell in this process; what it synthesizes is thrown away."""
    from raydfkd.devices import device_name, pick_device
    from raydfkd.runner.budget import run_within
    from raydfkd.runner.check import check
    from raydfkd.runner.run import evaluate, listening

    with tempfile.TemporaryDirectory() as scratch:
        recipe = load_recipe(cell.recipe, [*cell.overrides, f"seed={cell.seed}"], run_dir=scratch)
        recipe = _with_shared_teacher(recipe, folder)
        check(recipe)
        with listening(recipe, None) as events:
            outcome = run_within(recipe, cell.budget_s, events=events)
        judged = evaluate(outcome.recipe, outcome.student, split=cell.split)
    sets = "".join(f" --set {override}" for override in cell.overrides)
    return Result(
        recipe=cell.recipe,
        budget_s=cell.budget_s,
        seed=cell.seed,
        split=cell.split,
        student_top1=judged["student"]["top1"],
        teacher_top1=judged["teacher"]["top1"],
        agreement=judged["agreement"],
        seconds=round(outcome.seconds, 1),
        synthesis_seconds=round(outcome.synthesis_seconds, 1),
        images=outcome.images,
        student_steps=outcome.student_steps,
        device=device_name(pick_device(recipe.runtime.device)),
        command=f"raydfkd bench quality {cell.recipe} --budget {cell.budget_s:g} --seed {cell.seed} "
        f"--split {cell.split}{sets}",
    )


def markdown(results: Sequence[Result]) -> str:
    """A row a recipe, a column a budget: mean student top-1 in per cent, and over several seeds the range."""
    budgets = sorted({result.budget_s for result in results})
    lines = [
        "| recipe | teacher | " + " | ".join(f"{budget:g} s" for budget in budgets) + " |",
        "|---|---|" + "---|" * len(budgets),
    ]
    for recipe in dict.fromkeys(result.recipe for result in results):
        rows = [result for result in results if result.recipe == recipe]
        cells = [_cell([100 * row.student_top1 for row in rows if row.budget_s == budget]) for budget in budgets]
        lines.append(f"| {Path(recipe).stem} | {100 * rows[0].teacher_top1:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(top1: Sequence[float]) -> str:
    if not top1:
        return "-"
    mean = f"{statistics.mean(top1):.1f}"
    return mean if len(top1) == 1 else f"{mean} ({min(top1):.1f}-{max(top1):.1f})"
