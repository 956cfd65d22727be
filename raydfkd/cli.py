"""The command line. Torch and Ray are imported once a recipe shows no mistake by itself: help and typos are instant."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml
from rich.console import Console

from raydfkd.recipe import Recipe, load_recipe
from raydfkd.registry import RecipeError, did_you_mean
from raydfkd.static_check import static_check

if TYPE_CHECKING:
    from raydfkd.bench.table import Row
    from raydfkd.job import Executor, SynthesisOutcome
    from raydfkd.progress import Monitor

DONE, INCOMPLETE, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="raydfkd",
    help="Data-free knowledge distillation at cluster scale.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench = typer.Typer(help="Measure speed against published loops and raw libraries.", no_args_is_help=True)
app.add_typer(bench, name="bench")

Source = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a packaged recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe, e.g. --set seed=1.")
]
RunDir = Annotated[str | None, typer.Option(help="Folder of reports, student and checkpoints.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on the last line.")]
Rounds = Annotated[int, typer.Option(min=1, help="Alternating rounds; the median counts.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
On = Annotated[str | None, typer.Option("--on", metavar="ray|local", help="Where to work; the recipe says otherwise.")]


def main() -> None:
    """Entry point of the console script: turns what went wrong into one line and an exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        result = app(standalone_mode=False)
    except RecipeError as error:
        _complain(" ".join(str(error).splitlines()))
        sys.exit(WRONG_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        result = INTERRUPTED
    except typer.TyperException as error:
        _complain(error.format_message())
        sys.exit(WRONG_INPUT)
    if result == INTERRUPTED:  # also what typer makes of Ctrl-C, depending on its version
        _complain("interrupted; what was committed stays, and the same command goes on from there")
    sys.exit(result if isinstance(result, int) else DONE)


def _complain(text: str) -> None:
    typer.echo(text, err=True)


def _load(source: str, overrides: list[str] | None, run_dir: str | None, on: str | None = None) -> Recipe:
    """A recipe without a mistake that it shows by itself; from here on its code may run."""
    plan = _read(source, overrides, run_dir, on)
    static_check(plan)
    _allow_code()
    return plan


def _allow_code() -> None:
    """Let ``module:callable`` find modules of the current folder, as with ``python -m``."""
    sys.path.insert(0, os.getcwd())


def _read(source: str, overrides: list[str] | None, run_dir: str | None, on: str | None = None) -> Recipe:
    given = list(overrides or [])
    if on is not None:
        if on not in ("ray", "local"):
            raise RecipeError(f"--on is {on!r}; {did_you_mean(on, ['ray', 'local'])}")
        given.append(f"runtime.executor={on}")
    return load_recipe(source, given, run_dir)


def _executor(recipe: Recipe) -> Executor:
    if recipe.runtime.executor == "ray":
        from raydfkd.distributed.run import RayExecutor

        return RayExecutor()
    from raydfkd.local import LocalExecutor

    return LocalExecutor()


def _console(*, is_json: bool) -> Console:
    """Where people read: standard error when standard output belongs to a script."""
    return Console(stderr=is_json)


def _exit_code(outcome: SynthesisOutcome) -> int:
    return INCOMPLETE if outcome.quarantined else DONE


@app.command()
def run(
    recipe: Source,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    on: On = None,
    as_json: AsJson = False,
) -> int:
    """Do everything: teach if needed, synthesize and distil at once, judge, report."""
    started = time.monotonic()
    plan = _load(recipe, overrides, run_dir, on)
    from raydfkd import pipeline
    from raydfkd.job import open_job
    from raydfkd.report import summary_table

    data = pipeline.check(plan)
    console = _console(is_json=as_json)
    with pipeline.monitored(plan, console) as monitor:
        pipeline.ensure_teacher(plan, monitor)
        job = open_job(plan)
        monitor.say("teacher", "from here on no real image is read")
        pipeline.announce(job, monitor)
        outcome, state = _executor(plan).run(job, monitor)
    if not job.snapshot().images:
        _explain_incomplete(outcome, len(job.units))
        _complain("no image was made, so there is no student and no report")
        return INCOMPLETE
    student = pipeline.save_student(job, state)
    judged = pipeline.evaluate(plan, str(student), data)
    found = pipeline.report(
        job, judged, monitor, outcome, seconds=time.monotonic() - started, command=pipeline.command_line()
    )
    page = pipeline.write(job, found, data)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        console.print(summary_table(found))
        console.print(f"report    {page}\nstudent   {student}", highlight=False, soft_wrap=True)
    if outcome.quarantined:
        _explain_incomplete(outcome, len(job.units))
    return _exit_code(outcome)


def _explain_incomplete(outcome: SynthesisOutcome, planned: int) -> None:
    for failure in outcome.quarantined:
        _complain(f"unit {failure.unit} failed {failure.attempt} times ({failure.error}); set aside")
    _complain(
        f"{planned - len(outcome.quarantined)} of {planned} units are done; the same command tries the others again"
    )


@app.command()
def teach(recipe: Source, overrides: Overrides = None, run_dir: RunDir = None, as_json: AsJson = False) -> int:
    """Train the recipe's teacher on real data, anew even where its weights are there."""
    plan = _read(recipe, overrides, run_dir)
    _allow_code()
    from raydfkd import pipeline

    pipeline.check_teacher(plan)
    with pipeline.monitored(plan, _console(is_json=as_json)) as monitor:
        pipeline.ensure_teacher(plan, monitor, again=True)
    if as_json:
        typer.echo(json.dumps({"weights": plan.teacher.weights}))
    return DONE


def _with_job(
    source: str,
    overrides: list[str] | None,
    run_dir: str | None,
    on: str | None,
    is_json: bool,
    work: Callable[[Executor, Any, Monitor], dict[str, Any]],
) -> int:
    plan = _load(source, overrides, run_dir, on)
    from raydfkd import pipeline
    from raydfkd.job import open_job

    pipeline.check(plan)
    console = _console(is_json=is_json)
    with pipeline.monitored(plan, console) as monitor:
        pipeline.ensure_teacher(plan, monitor)
        job = open_job(plan)
        pipeline.announce(job, monitor)
        found = work(_executor(plan), job, monitor)
    code = int(found.pop("exit_code", DONE))
    typer.echo(json.dumps(found) if is_json else "\n".join(f"{key:20} {value}" for key, value in found.items()))
    return code


@app.command()
def synthesize(
    recipe: Source, overrides: Overrides = None, run_dir: RunDir = None, on: On = None, as_json: AsJson = False
) -> int:
    """Make the transfer set only."""

    def work(executor: Executor, job: Any, monitor: Monitor) -> dict[str, Any]:
        outcome = executor.synthesize(job, monitor)
        if outcome.quarantined:
            _explain_incomplete(outcome, len(job.units))
        snapshot = job.snapshot()
        return {
            "images": snapshot.images,
            "images_per_second": round(monitor.images_per_second, 3),
            "units": f"{len(snapshot.commits)}/{len(job.units)}",
            "content_digest": snapshot.content_digest(),
            "transfer_set": job.recipe.transfer_set.uri,
            "exit_code": _exit_code(outcome),
        }

    return _with_job(recipe, overrides, run_dir, on, as_json, work)


@app.command()
def distill(
    recipe: Source, overrides: Overrides = None, run_dir: RunDir = None, on: On = None, as_json: AsJson = False
) -> int:
    """Train the student only, on a transfer set that is there or being made elsewhere."""

    def work(executor: Executor, job: Any, monitor: Monitor) -> dict[str, Any]:
        from raydfkd import pipeline

        if job.snapshot().images < job.planned_images and not job.transfer_set.is_closed():
            monitor.say("student", "the set is not complete yet; training keeps pace with whoever makes it")
        state = executor.distill(job, monitor)
        images = job.snapshot().images
        if not images:
            raise RecipeError(f"transfer_set.uri is {job.recipe.transfer_set.uri}: no image came of its synthesis")
        return {"student": str(pipeline.save_student(job, state)), "images": images}

    return _with_job(recipe, overrides, run_dir, on, as_json, work)


@app.command()
def evaluate(
    recipe: Source,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    student: Annotated[str | None, typer.Option(help="Weights; the run's student.safetensors unless given.")] = None,
    split: Annotated[str, typer.Option(help="test or validation; choose methods on validation only.")] = "test",
    as_json: AsJson = False,
) -> int:
    """Judge a saved student on the recipe's real data."""
    if split not in ("test", "validation"):
        raise RecipeError(f"--split is {split!r}; {did_you_mean(split, ['test', 'validation'])}")
    plan = _load(recipe, overrides, run_dir)
    from raydfkd import pipeline

    data = pipeline.check(plan)
    weights = student or str(Path(plan.run_dir) / "student.safetensors")
    chosen: Literal["test", "validation"] = "test" if split == "test" else "validation"
    judged = pipeline.evaluate(plan, weights, data, split=chosen)
    if as_json:
        typer.echo(json.dumps(judged))
    else:
        for role in ("teacher", "student"):
            top1 = judged[role]["top1"]
            typer.echo(f"{role:10} {'not judged (no real data)' if top1 is None else f'{top1:.2%}'}")
        typer.echo(f"agreement  {judged['agreement']:.2%}   on {judged['judged_on']}")
    return DONE


@app.command()
def check(
    recipe: Source,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    no_code: Annotated[
        bool,
        typer.Option("--no-code", help="Run no code and open no data that the recipe names: for recipes of strangers."),
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Validate a recipe and print it resolved; nothing is made."""
    plan = _read(recipe, overrides, run_dir)
    static_check(plan)
    if not no_code:
        _allow_code()
        from raydfkd import pipeline

        pipeline.check(plan)
    if as_json:
        typer.echo(json.dumps(plan.shown()))
        return DONE
    units = plan.plan()
    size = f"{len(units)} units, {sum(unit.request.count for unit in units):,} images"
    typer.echo(yaml.safe_dump(plan.shown(), sort_keys=False, default_flow_style=None).rstrip())
    typer.echo(f"# sound: {size}" + ("; networks and files were not looked at" if no_code else ""))
    return DONE


@app.command()
def show(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A family, a plug-in or a recipe.")] = None,
) -> int:
    """List recipes and plug-ins with their options, or explain one of them."""
    from raydfkd.catalog import show as catalog

    for line in catalog(name):
        typer.echo(line)
    return DONE


@app.command()
def report(recipe: Source, overrides: Overrides = None, run_dir: RunDir = None, as_json: AsJson = False) -> int:
    """Write report.html anew from a finished run, and print its table."""
    plan = _load(recipe, overrides, run_dir)
    path = Path(plan.run_dir) / "report.json"
    if not path.is_file():
        raise RecipeError(f"run_dir is {plan.run_dir!r}: there is no report.json; `raydfkd run` writes it")
    from raydfkd import pipeline
    from raydfkd.job import open_job
    from raydfkd.report import summary_table

    found = json.loads(path.read_text())
    page = pipeline.write(open_job(plan), found, pipeline.check(plan))
    if as_json:
        typer.echo(json.dumps(found))
    else:
        console = _console(is_json=False)
        console.print(summary_table(found))
        console.print(f"report    {page}", highlight=False, soft_wrap=True)
    return DONE


@bench.command("synthesis")
def bench_synthesis(
    as_json: AsJson = False,
    rounds: Rounds = 7,
    device: Device = "auto",
    case: Annotated[list[str] | None, typer.Option(help="Only this case; may be repeated.")] = None,
) -> int:
    """Steps per second of pixel synthesis against the loop as published and a fair one."""
    from raydfkd.bench.synthesis import bench_synthesis as measure

    return _print_rows(measure(rounds=rounds, device=device, cases=tuple(case or ())), is_json=as_json)


@bench.command("shards")
def bench_shards(
    as_json: AsJson = False,
    rounds: Rounds = 7,
    with_ray: Annotated[bool, typer.Option(help="Ray Data too, which takes minutes.")] = True,
) -> int:
    """Rows per second of the transfer set against raw pyarrow and other readers."""
    from raydfkd.bench.feeders import FEEDERS
    from raydfkd.bench.shards import bench_shards as measure

    feeders = dict(FEEDERS)
    if with_ray:
        from raydfkd.distributed.feeding import ray_data

        feeders["Ray Data"] = ray_data
    return _print_rows(measure(rounds=rounds, feeders=feeders), is_json=as_json)


@bench.command("generators")
def bench_generators(as_json: AsJson = False, rounds: Rounds = 5, device: Device = "auto") -> int:
    """Training steps of many generators as one stack against one by one."""
    from raydfkd.bench.generators import bench_generators as measure

    return _print_rows(measure(rounds=rounds, device=device), is_json=as_json)


@bench.command("overlap")
def bench_overlap(as_json: AsJson = False, rounds: Rounds = 3, device: Device = "auto") -> int:
    """Share of its time that a device waits for shards to be encoded, written and committed."""
    from raydfkd.bench.overlap import bench_overlap as measure

    return _print_rows(measure(rounds=rounds, device=device), is_json=as_json)


@bench.command("student")
def bench_student(as_json: AsJson = False, rounds: Rounds = 5, device: Device = "auto") -> int:
    """Images per second of a student's training from the transfer set against the same from memory."""
    from raydfkd.bench.student import bench_student as measure

    return _print_rows(measure(rounds=rounds, device=device), is_json=as_json)


@bench.command("quality")
def bench_quality(  # noqa: PLR0913 - one option each
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Recipe files or packaged recipes.")],
    budget: Annotated[list[float] | None, typer.Option(min=1, help="Device-seconds; repeatable [default: 60].")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds; repeatable [default: 0].")] = None,
    split: Annotated[
        Literal["validation", "test"], typer.Option(help="validation to choose by, test to judge once.")
    ] = "validation",
    out: Annotated[Path, typer.Option(help="Results and teachers; the same folder goes on.")] = Path("runs/quality"),
    at_once: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 1,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> int:
    """Student accuracy for a budget of device-seconds, synthesis and training together."""
    from raydfkd.bench.quality import Cell, markdown
    from raydfkd.bench.quality import bench_quality as measure

    changes = tuple(overrides or ())
    for recipe in recipes:
        _load(recipe, overrides, None)
    cells = [
        Cell(recipe=recipe, budget_s=seconds, seed=number, split=split, overrides=changes)
        for recipe in recipes
        for number in seed or [0]
        for seconds in sorted(budget or [60.0])
    ]
    found = []
    for result in measure(cells, out, at_once=at_once):
        found.append(result)
        line = json.dumps(asdict(result)) if as_json else f"{result.student_top1:.1%}   {result.command}"
        typer.echo(line, err=not as_json)
    if not as_json:
        typer.echo(markdown(found))
    return DONE


def _print_rows(rows: Iterable[Row], *, is_json: bool) -> int:
    from raydfkd.bench.table import table

    found = []
    for row in rows:
        found.append(row)
        if is_json:
            typer.echo(row.to_json())
    if not is_json:
        typer.echo(table(found))
    return DONE
