"""Student accuracy for a budget of device-seconds, synthesis and training together: the figure to pick a recipe by."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from raydfkd.bench.controls import NOISE, REAL, RealImages
from raydfkd.bench.engine import code_digest, engine
from raydfkd.config.families import family
from raydfkd.config.load import load_recipe, load_with_method
from raydfkd.config.recipe import Recipe
from raydfkd.config.registry import import_callable
from raydfkd.config.schema import LIBRARIES, is_file
from raydfkd.config.static_check import plugins_of
from raydfkd.devices import device_name, pick_device
from raydfkd.errors import RecipeError
from raydfkd.images.real_data import Split
from raydfkd.networks.weights import read_weights, weights_exist
from raydfkd.report.redaction import redacted_setting
from raydfkd.store.store import Store

TEACHING = ("networks", "images", "runner/teach.py", "bench/zoo_data.py", "devices.py", "seeds.py")
"""Code that a teacher's training depends on."""
_NOWHERE = "not-there"
"""Run folder of a recipe while nothing is run: paths within it are not part of a digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run: a recipe, a budget, a seed."""

    recipe: str
    """A file, or the name of a packaged recipe."""
    method: str | None = None
    """Method that stands in for the recipe's own, see ``load_with_method``; ``controls.REAL`` for real images."""
    budget_s: float
    """Device-seconds for synthesis and student training together."""
    seed: int
    split: Split
    """Real images that judge: validation while choosing, test once at the end."""
    overrides: tuple[str, ...] = ()
    with_evidence: bool = False
    """Whether the evidence is collected too that needs no real image, in seconds beside the budget."""

    @property
    def title(self) -> str:
        """Recipe, and method where it is another."""
        return Path(self.recipe).stem + (f"-{Path(self.method).stem}" if self.method else "")

    @property
    def command(self) -> str:
        """Command that repeats this cell alone."""
        sets = "".join(f" --set {shlex.quote(redacted_setting(override))}" for override in self.overrides)
        how = f"--seed {self.seed} --split {self.split}{sets}"
        if self.method is None:
            return f"raydfkd bench quality {self.recipe} --budget {self.budget_s:g} {how}"
        return f"raydfkd bench methods {self.method} --teacher {self.recipe} --budget {self.budget_s:g}s --full {how}"

    def load(self) -> Recipe:
        """The cell's recipe with its own seed."""
        if self.method is None:
            return load_recipe(self.recipe, list(self.overrides), run_dir=_NOWHERE)
        method = NOISE if self.method == REAL else self.method
        return load_with_method(self.recipe, method, list(self.overrides), run_dir=_NOWHERE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A cell with its recipe as it was when the cell was looked at, and a digest of all that its figures depend on."""

    cell: Cell
    recipe: Recipe
    """The recipe with the cell's seed, and a teacher that other cells share where the recipe trains one."""
    digest: str
    """Eight hexadecimal digits; the same for all seeds, budgets and splits of a recipe."""

    @property
    def file(self) -> str:
        """Name of the result's file; results of other figures have another."""
        cell = self.cell
        return f"{cell.title}-{self.digest}-{cell.budget_s:g}s-seed{cell.seed}-{cell.split}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result of a cell. Accuracies are shares of real images, seconds are device-seconds unless they say wall."""

    recipe: str
    digest: str
    """Digest of the resolved recipe, the code, the teacher and the device; see ``Plan``."""
    budget_s: float
    seed: int
    split: Split
    student_top1: float
    teacher_top1: float
    agreement: float
    """Share of real images that student and teacher put in the same class."""
    seconds: float
    synthesis_seconds: float
    wall_seconds: float
    """Real time; more than ``seconds`` where other processes had the CPU."""
    images: int
    student_steps: int
    device: str
    versions: dict[str, str]
    command: str
    """Command that repeats this cell alone."""
    method: str | None = None
    """Method that stood in for the recipe's own."""
    evidence: Mapping[str, float] | None = None
    """See ``runner.evidence``; None where it was not asked for."""


OnError = Callable[[Cell, Exception], None]
"""Receives a cell that came to nothing."""


def fail(_: Cell, error: Exception) -> None:
    """Let a cell that comes to nothing end the benchmark."""
    raise error


def bench_quality(
    cells: Sequence[Cell], folder: Path, *, at_once: int = 1, on_error: OnError = fail
) -> Iterator[Result]:
    """Run the cells that ``folder`` has no result of yet, each in a fresh process of one CPU thread; yield all.

    Args:
        cells: the cells to measure.
        folder: results, and the teachers that the recipes train; the same folder resumes where it was stopped.
        at_once: processes; more than one only where each has a core of its own.
        on_error: told of a cell that comes to nothing, of which no result is yielded.
    """
    store = Store(str(folder))
    waiting, teaching = [], {}
    known: dict[tuple[str, str | None, tuple[str, ...]], tuple[Recipe, str]] = {}
    for cell in cells:
        key = (cell.recipe, cell.method, cell.overrides)
        if key not in known:
            known[key] = _opened(cell, folder)
        unseeded, digest = known[key]
        plan = Plan(cell=cell, recipe=unseeded.model_copy(update={"seed": cell.seed}), digest=digest)
        if store.exists(plan.file):
            yield Result(**json.loads(store.get(plan.file)))
        else:
            waiting.append(plan)
            teaching[unseeded.teacher.weights] = unseeded
    if not waiting:
        return
    for unseeded in teaching.values():
        _teach(unseeded, folder)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes to come; in this one torch has its threads already
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(at_once, mp_context=context, max_tasks_per_child=1) as pool:
        running = {pool.submit(measure, plan): plan for plan in waiting}
        for done in as_completed(running):
            try:
                result = done.result()
            except Exception as error:
                on_error(running[done].cell, error)
                continue
            store.put(running[done].file, json.dumps(asdict(result), indent=1).encode())
            yield result


def _opened(cell: Cell, folder: Path) -> tuple[Recipe, str]:
    """The cell's recipe with its own seed and a teacher that its cells share, and the digest of them all."""
    recipe = cell.load()
    if recipe.real_data is None:
        raise RecipeError(f"{cell.recipe}: real_data is missing, on which the student is judged; give it or use `run`")
    recipe = _sharing_teacher(recipe, folder)
    return recipe, digest_of(recipe, is_control=cell.method == REAL)


def taught(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the weights of its teacher in ``folder``, which is trained unless they are there."""
    recipe = _sharing_teacher(recipe, folder)
    _teach(recipe, folder)
    return recipe


def _sharing_teacher(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with a file in ``folder`` for the teacher that it trains, the same for all that train such a one."""
    if recipe.teacher.train is None:
        return recipe
    weights = folder / "teachers" / _teacher_file(recipe)
    return recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"weights": str(weights)})})


def digest_of(recipe: Recipe, *, is_control: bool = False) -> str:
    """A digest of all that a cell's figures depend on beside its seed, budget and split.

    That is the recipe with its overrides, the engine and torch, the device, the teacher, and the user's own modules
    that the recipe names (not what those import). Storage, workers and the verifier are not part of it. ``is_control``
    says that its images are real ones.
    """
    weights = recipe.teacher.weights
    payload = {
        "recipe": recipe.model_dump(
            mode="json",
            exclude={
                "name": True,
                "seed": True,
                "run_dir": True,
                "runtime": True,
                "verifier": True,
                "teacher": {"weights"},
                "transfer_set": {"uri", "storage_options"},
            },
        ),
        "engine": engine(),
        "device": device_name(pick_device(recipe.runtime.device)),
        "teacher": Path(weights).name if recipe.teacher.train is not None else _digest_of_weights(weights),
        "own code": {name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for name, path in _own_modules(recipe)},
    }
    return _short_digest(payload | ({"control": REAL} if is_control else {}))


def _teacher_file(recipe: Recipe) -> str:
    """Names a shared teacher by all that its training depends on; all seeds and budgets of a recipe have the same."""
    payload = {
        "seed": recipe.seed,
        "teacher": recipe.teacher.model_dump(mode="json", exclude={"weights"}),
        "real_data": None if recipe.real_data is None else recipe.real_data.model_dump(mode="json"),
        "engine": {**engine(), "raydfkd": code_digest(*TEACHING)},
    }
    return f"{recipe.teacher.network.rpartition(':')[2]}-{_short_digest(payload)}.safetensors"


def _short_digest(payload: object) -> str:
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()[:8]


def _digest_of_weights(uri: str) -> str:
    """SHA-256 of a file, or its name where there is none: whoever needs it will say so."""
    if not is_file(uri) or not weights_exist(uri, where="teacher.weights"):
        return uri
    return hashlib.sha256(read_weights(uri, where="teacher.weights")).hexdigest()


def _own_modules(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Name and file of each module that is named in the recipe as module:Class."""
    for chosen in plugins_of(recipe):
        name = chosen.name.partition(":")[0]
        if family(chosen.family).is_own(chosen.name) and name not in LIBRARIES:
            import_callable(chosen.name, where=chosen.where)
            file = sys.modules[name].__file__
            if file is not None:
                yield name, file


def _teach(recipe: Recipe, folder: Path) -> None:
    from rich.console import Console

    from raydfkd.runner.run import listening
    from raydfkd.runner.teach import teach

    if recipe.teacher.train is None or weights_exist(recipe.teacher.weights, where="teacher.weights"):
        return
    recipe = recipe.model_copy(update={"run_dir": str(folder / "teachers")})
    with listening(recipe, Console(stderr=True)) as events:
        teach(recipe, events)


def measure(plan: Plan) -> Result:
    """Run one cell in this process; what it synthesizes is thrown away."""
    from raydfkd.runner.budget import run_within
    from raydfkd.runner.check import check
    from raydfkd.runner.evidence import Evidence
    from raydfkd.runner.run import judge_saved, saved_student

    cell = plan.cell
    with tempfile.TemporaryDirectory() as scratch:
        transfer_set = plan.recipe.transfer_set.model_copy(update={"uri": f"{scratch}/transfer_set"})
        recipe = plan.recipe.model_copy(update={"run_dir": scratch, "transfer_set": transfer_set})
        prepared = check(recipe)
        control = partial(RealImages, recipe=recipe) if cell.method == REAL else None
        outcome = run_within(recipe, cell.budget_s, synthesizer=control)
        # Of the recipe whose plan is whole; that of the outcome was cut.
        judged = judge_saved(prepared, str(outcome.student), split=cell.split)
        found = None
        if cell.with_evidence:
            assert prepared.teacher is not None, "it was there to be judged"
            found = Evidence(recipe, prepared.teacher.module.cpu()).of(saved_student(recipe, outcome.student))
    return Result(
        recipe=cell.recipe,
        digest=plan.digest,
        budget_s=cell.budget_s,
        seed=cell.seed,
        split=cell.split,
        student_top1=judged["student"]["top1"],
        teacher_top1=judged["teacher"]["top1"],
        agreement=judged["agreement"],
        seconds=round(outcome.seconds, 1),
        synthesis_seconds=round(outcome.synthesis_seconds, 1),
        wall_seconds=round(outcome.wall_seconds, 1),
        images=outcome.images,
        student_steps=outcome.student_steps,
        device=device_name(pick_device(recipe.runtime.device)),
        versions=engine(),
        command=cell.command,
        method=cell.method,
        evidence=found,
    )


def markdown(results: Sequence[Result]) -> str:
    """Two rows a recipe, a column a budget: student top-1 in per cent, then what the budget bought.

    Means over the seeds, and the range in brackets where they differ.
    """
    budgets = sorted({result.budget_s for result in results})
    lines = [
        "| recipe (digest) | teacher | " + " | ".join(f"{budget:g} s" for budget in budgets) + " |",
        "|---|---|" + "---|" * len(budgets),
    ]
    for recipe, digest in dict.fromkeys((result.recipe, result.digest) for result in results):
        rows = [result for result in results if (result.recipe, result.digest) == (recipe, digest)]
        columns = [[row for row in rows if row.budget_s == budget] for budget in budgets]
        top1 = [spread([100 * row.student_top1 for row in column], ".1f") for column in columns]
        lines.append(f"| {Path(recipe).stem} ({digest}) | {100 * rows[0].teacher_top1:.1f} | {' | '.join(top1)} |")
        lines.append(f"| images, steps, wall s | | {' | '.join(map(_bought, columns))} |")
    return "\n".join(lines)


def _bought(column: Sequence[Result]) -> str:
    spreads = [
        spread([row.images for row in column], ",.0f"),
        spread([row.student_steps for row in column], ",.0f"),
        spread([row.wall_seconds for row in column], ",.0f"),
    ]
    return "; ".join(spreads) if column else "-"


def spread(values: Sequence[float], form: str) -> str:
    """Mean and range of values in a form such as .1f; a dash where there are none."""
    if not values:
        return "-"
    mean, low, high = (format(value, form) for value in (statistics.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low}-{high})"
