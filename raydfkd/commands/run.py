"""Commands that work: run, teach, synthesize, distill, evaluate."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from raydfkd.commands.options import AsJson, On, Overrides, RunDir, Source, allow_code, load, read
from raydfkd.commands.output import DONE, INCOMPLETE, complain, console_for, print_summary
from raydfkd.config.load import expand_home
from raydfkd.report.redaction import redacted

if TYPE_CHECKING:
    from collections.abc import Collection

    from raydfkd.job import Job, SynthesisOutcome


def run(
    recipe: Source,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    on: On = None,
    as_json: AsJson = False,
) -> int:
    """Do everything: teach if needed, synthesize and distil at once, judge, report."""
    plan = load(recipe, overrides, run_dir, on)
    from raydfkd.runner.run import run as run_recipe

    console = console_for(is_json=as_json)
    result = run_recipe(plan, console=console)
    if not result.report:
        code = _exit_code(result.job, result.outcome, result.missing)
        complain("no image was made, so there is no student and no report")
        return code
    if as_json:
        typer.echo(json.dumps(result.report))
    else:
        print_summary(console, result.report, report=result.page, student=result.student)
    return _exit_code(result.job, result.outcome, result.missing)


def teach(recipe: Source, overrides: Overrides = None, run_dir: RunDir = None, as_json: AsJson = False) -> int:
    """Train the recipe's teacher on real data, again even where its weights are there."""
    plan = read(recipe, overrides, run_dir)
    allow_code()
    from raydfkd.runner.run import listening
    from raydfkd.runner.teach import check_teaching
    from raydfkd.runner.teach import teach as train_teacher

    check_teaching(plan)
    with listening(plan, console_for(is_json=as_json)) as events:
        train_teacher(plan, events)
    if as_json:
        typer.echo(json.dumps({"weights": redacted(plan.teacher.weights)}))
    return DONE


def synthesize(
    recipe: Source, overrides: Overrides = None, run_dir: RunDir = None, on: On = None, as_json: AsJson = False
) -> int:
    """Make the transfer set only, with a page of pictures of it."""
    plan = load(recipe, overrides, run_dir, on)
    from raydfkd.report.page import verified_words
    from raydfkd.runner.run import synthesize_job

    made = synthesize_job(plan, console=console_for(is_json=as_json))
    summary = made.summary
    if not as_json:
        summary = {key: value for key, value in summary.items() if key not in made.verified}
        summary |= verified_words(made.verified)
    _print(summary, is_json=as_json)
    return _exit_code(made.job, made.outcome, made.missing)


def distill(
    recipe: Source, overrides: Overrides = None, run_dir: RunDir = None, on: On = None, as_json: AsJson = False
) -> int:
    """Train the student only, on a transfer set that is there or being made elsewhere."""
    plan = load(recipe, overrides, run_dir, on)
    from raydfkd.runner.run import distill_job

    _print(distill_job(plan, console=console_for(is_json=as_json)).summary, is_json=as_json)
    return DONE


def evaluate(
    recipe: Source,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    student: Annotated[str | None, typer.Option(help="Weights; the run's student.safetensors unless given.")] = None,
    split: Annotated[
        Literal["validation", "test"] | None,
        typer.Option(help="Real images that judge; choose methods on validation only [default: test]."),
    ] = None,
    pictures: Annotated[
        str | None, typer.Option(help="Folder of pictures without labels: how often student and teacher agree on them.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Judge a saved student on real data or on pictures without labels; without any, estimate its agreement."""
    plan = load(recipe, overrides, run_dir)
    from raydfkd.report.page import FIGURES, estimated
    from raydfkd.runner.judge import skipped_line
    from raydfkd.runner.run import evaluate as judge

    judged = judge(
        plan,
        expand_home(student) if student else None,
        split=split,
        pictures=expand_home(pictures) if pictures else None,
    )
    if as_json:
        typer.echo(json.dumps(judged))
        return DONE
    for role in ("teacher", "student"):
        if judged[role]["top1"] is not None:
            beside = [
                f"{name} {judged[role][key]:.2%}" for key, name in FIGURES.items() if judged[role][key] is not None
            ]
            typer.echo("   ".join([f"{role:10} {judged[role]['top1']:.2%}", *beside]))
    estimate = judged["student"]["estimate"]
    if estimate is not None:
        typer.echo(f"estimate   {estimated(estimate)}   agreement on real images; {estimate['words']}")
    if judged["agreement"] is not None:
        typer.echo(f"agreement  {judged['agreement']:.2%}   on {judged['judged_images']:,} {judged['judged_on']}")
    for warning in skipped_line(judged["skipped_pictures"]):
        typer.echo(f"warning    {warning}")
    return DONE


def _print(found: dict[str, object], *, is_json: bool) -> None:
    typer.echo(json.dumps(found) if is_json else "\n".join(f"{key:20} {value}" for key, value in found.items()))


def _exit_code(job: Job, outcome: SynthesisOutcome, missing: Collection[str]) -> int:
    """The exit code, by whether the set has all that was planned; says what is missing and why."""
    if not missing:
        return DONE
    failures = [failure for failure in outcome.given_up if failure.unit in missing]
    for failure in failures:
        complain(f"unit {failure.unit} failed {failure.attempt} times ({failure.error}); given up")
    for unit in sorted(set(missing) - {failure.unit for failure in failures}):
        complain(f"unit {unit} was committed, found damaged and taken out")
    planned = len(job.units)
    complain(f"{planned - len(missing)} of {planned} units are done; the same command tries the others again")
    return INCOMPLETE
