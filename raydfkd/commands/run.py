"""Commands that work: run, teach, synthesize, distill, evaluate."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from raydfkd.commands.options import AsJson, On, Overrides, RunDir, Source, allow_code, load, read
from raydfkd.commands.output import DONE, INCOMPLETE, complain, console_for, print_summary
from raydfkd.config.load import expand_home
from raydfkd.config.recipe import Recipe
from raydfkd.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from raydfkd.job import Job, SynthesisOutcome
    from raydfkd.run.executor import Executor
    from raydfkd.run.progress import Monitor


def run(
    recipe: Source,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    on: On = None,
    as_json: AsJson = False,
) -> int:
    """Do everything: teach if needed, synthesize and distil at once, judge, report."""
    started = time.monotonic()
    plan = load(recipe, overrides, run_dir, on)
    from raydfkd.job import open_job
    from raydfkd.report import provenance as in_provenance
    from raydfkd.run import check as in_check
    from raydfkd.run import judge as in_judge
    from raydfkd.run import run as pipeline
    from raydfkd.run import teach as in_teach

    data = in_check.check(plan)
    console = console_for(is_json=as_json)
    with pipeline.monitored(plan, console) as monitor:
        in_teach.ensure_teacher(plan, monitor)
        job = open_job(plan)
        monitor.say("teacher", "from here on no real image is read")
        pipeline.announce(job, monitor)
        outcome, state = _executor(plan).run(job, monitor)
    if not job.snapshot().images:
        code = _exit_code(job, outcome)
        complain("no image was made, so there is no student and no report")
        return code
    student = pipeline.save_student(job, state)
    judged = in_judge.evaluate(plan, str(student), data)
    found = pipeline.report(
        job, judged, monitor, outcome, seconds=time.monotonic() - started, command=in_provenance.command_line()
    )
    page = pipeline.write(job, found, data)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        print_summary(console, found, report=page, student=student)
    return _exit_code(job, outcome)


def teach(recipe: Source, overrides: Overrides = None, run_dir: RunDir = None, as_json: AsJson = False) -> int:
    """Train the recipe's teacher on real data, anew even where its weights are there."""
    plan = read(recipe, overrides, run_dir)
    allow_code()
    from raydfkd.run import run as pipeline
    from raydfkd.run import teach as in_teach

    in_teach.check_teacher(plan)
    with pipeline.monitored(plan, console_for(is_json=as_json)) as monitor:
        in_teach.ensure_teacher(plan, monitor, again=True)
    if as_json:
        typer.echo(json.dumps({"weights": plan.teacher.weights}))
    return DONE


def synthesize(
    recipe: Source, overrides: Overrides = None, run_dir: RunDir = None, on: On = None, as_json: AsJson = False
) -> int:
    """Make the transfer set only."""

    def work(executor: Executor, job: Job, monitor: Monitor) -> dict[str, Any]:
        outcome = executor.synthesize(job, monitor)
        snapshot = job.snapshot()
        return {
            "images": snapshot.images,
            "images_per_second": round(monitor.images_per_second, 3),
            "units": f"{len(snapshot.commits)}/{len(job.units)}",
            "content_digest": snapshot.content_digest(),
            "transfer_set": job.recipe.transfer_set.uri,
            "exit_code": _exit_code(job, outcome),
        }

    return _with_job(recipe, overrides, run_dir, on, as_json, work)


def distill(
    recipe: Source, overrides: Overrides = None, run_dir: RunDir = None, on: On = None, as_json: AsJson = False
) -> int:
    """Train the student only, on a transfer set that is there or being made elsewhere."""

    def work(executor: Executor, job: Job, monitor: Monitor) -> dict[str, Any]:
        from raydfkd.run import run as pipeline

        if job.snapshot().images < job.planned_images and not job.transfer_set.is_closed():
            monitor.say("student", "the set is not complete yet; training keeps pace with whoever makes it")
        state = executor.distill(job, monitor)
        images = job.snapshot().images
        if not images:
            raise RecipeError(f"transfer_set.uri is {job.recipe.transfer_set.uri}: no image came of its synthesis")
        return {"student": str(pipeline.save_student(job, state)), "images": images}

    return _with_job(recipe, overrides, run_dir, on, as_json, work)


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
    plan = load(recipe, overrides, run_dir)
    from raydfkd.run import check as in_check
    from raydfkd.run import judge as in_judge

    data = in_check.check(plan)
    weights = expand_home(student) if student else str(Path(plan.run_dir) / "student.safetensors")
    chosen: Literal["test", "validation"] = "test" if split == "test" else "validation"
    judged = in_judge.evaluate(plan, weights, data, split=chosen)
    if as_json:
        typer.echo(json.dumps(judged))
    else:
        for role in ("teacher", "student"):
            top1 = judged[role]["top1"]
            typer.echo(f"{role:10} {'not judged (no real data)' if top1 is None else f'{top1:.2%}'}")
        typer.echo(f"agreement  {judged['agreement']:.2%}   on {judged['judged_on']}")
    return DONE


def _with_job(
    source: str,
    overrides: list[str] | None,
    run_dir: str | None,
    on: str | None,
    is_json: bool,
    work: Callable[[Executor, Job, Monitor], dict[str, Any]],
) -> int:
    plan = load(source, overrides, run_dir, on)
    from raydfkd.job import open_job
    from raydfkd.run import check as in_check
    from raydfkd.run import run as pipeline
    from raydfkd.run import teach as in_teach

    in_check.check(plan)
    console = console_for(is_json=is_json)
    with pipeline.monitored(plan, console) as monitor:
        in_teach.ensure_teacher(plan, monitor)
        job = open_job(plan)
        pipeline.announce(job, monitor)
        found = work(_executor(plan), job, monitor)
    code = int(found.pop("exit_code", DONE))
    typer.echo(json.dumps(found) if is_json else "\n".join(f"{key:20} {value}" for key, value in found.items()))
    return code


def _executor(recipe: Recipe) -> Executor:
    if recipe.runtime.executor == "ray":
        from raydfkd.distributed.executor import RayExecutor

        return RayExecutor()
    from raydfkd.run.local import LocalExecutor

    return LocalExecutor()


def _exit_code(job: Job, outcome: SynthesisOutcome) -> int:
    """Whether the set has all that was planned; says what is missing and why."""
    missing = job.unit_ids - job.transfer_set.committed()
    if not missing:
        return DONE
    failures = [failure for failure in outcome.given_up if failure.unit in missing]
    for failure in failures:
        complain(f"unit {failure.unit} failed {failure.attempt} times ({failure.error}); set aside")
    for unit in sorted(missing - {failure.unit for failure in failures}):
        complain(f"unit {unit} was committed, found damaged and taken out")
    planned = len(job.units)
    complain(f"{planned - len(missing)} of {planned} units are done; the same command tries the others again")
    return INCOMPLETE
