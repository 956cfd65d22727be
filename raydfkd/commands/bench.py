"""Commands that measure: bench."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from raydfkd.commands.options import AsJson, Overrides, load, seconds_of
from raydfkd.commands.output import DONE, Commands

if TYPE_CHECKING:
    from raydfkd.bench.quality import Result
    from raydfkd.bench.table import Row
    from raydfkd.bench.zoo import Row as ZooRow

bench = typer.Typer(
    help="Measure speed against published loops and raw libraries, and accuracy for a budget.",
    no_args_is_help=True,
    cls=Commands,
)
Rounds = Annotated[int, typer.Option(min=1, help="Alternating rounds; median and range are shown.")]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto takes CUDA where there is a GPU.")]


@bench.command("synthesis")
def bench_synthesis(
    as_json: AsJson = False,
    rounds: Rounds = 7,
    device: Device = "auto",
    case: Annotated[list[str] | None, typer.Option(help="Only this case; may be repeated.")] = None,
) -> int:
    """Steps per second of pixel synthesis, against the loop as published and a fair one."""
    from raydfkd.bench.synthesis import bench_synthesis as measure

    return _print_rows(measure(rounds=rounds, device=device, cases=tuple(case or ())), device, is_json=as_json)


@bench.command("shards")
def bench_shards(
    as_json: AsJson = False,
    rounds: Rounds = 7,
    with_ray: Annotated[bool, typer.Option(help="Ray Data too, which takes minutes.")] = True,
) -> int:
    """Rows per second of the transfer set, against raw pyarrow and other readers."""
    from raydfkd.bench.feeders import FEEDERS, ray_data
    from raydfkd.bench.shards import bench_shards as measure

    feeders = {**FEEDERS, "Ray Data": ray_data} if with_ray else FEEDERS
    return _print_rows(measure(rounds=rounds, feeders=feeders), "cpu", is_json=as_json)


@bench.command("generators")
def bench_generators(as_json: AsJson = False, rounds: Rounds = 5, device: Device = "auto") -> int:
    """Training steps of many generators as one stack, against one by one."""
    from raydfkd.bench.generators import bench_generators as measure

    return _print_rows(measure(rounds=rounds, device=device), device, is_json=as_json)


@bench.command("overlap")
def bench_overlap(as_json: AsJson = False, rounds: Rounds = 3, device: Device = "auto") -> int:
    """Share of its time that a device waits for images to be stored."""
    from raydfkd.bench.overlap import bench_overlap as measure

    return _print_rows(measure(rounds=rounds, device=device), device, is_json=as_json)


@bench.command("student")
def bench_student(as_json: AsJson = False, rounds: Rounds = 5, device: Device = "auto") -> int:
    """Images per second of a student's training from disk, against the same from memory."""
    from raydfkd.bench.student import bench_student as measure

    return _print_rows(measure(rounds=rounds, device=device), device, is_json=as_json)


@bench.command("set")
def bench_set(
    as_json: AsJson = False,
    units: Annotated[int, typer.Option(min=1, help="Units of the set.")] = 20_000,
    uri: Annotated[str | None, typer.Option(help="Measure in a new folder there too, as in s3://bucket.")] = None,
) -> int:
    """Seconds, requests and bytes that a set of many units costs its readers."""
    from raydfkd.bench.set import bench_set as measure

    return _print_rows(measure(units=units, uri=uri), "cpu", is_json=as_json)


@bench.command("quality")
def bench_quality(  # noqa: PLR0913 - one option each
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Recipe files or packaged recipes.")],
    budget: Annotated[list[float] | None, typer.Option(min=1, help="Device-seconds; repeatable [default: 60].")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds; repeatable [default: 0].")] = None,
    split: Annotated[
        Literal["validation", "test"], typer.Option(help="validation to choose by, test to judge once.")
    ] = "validation",
    out: Annotated[Path, typer.Option(help="Results and teachers; the same folder resumes.")] = Path("runs/quality"),
    at_once: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 1,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> int:
    """Student accuracy for a budget of device-seconds, all work together.

    A recipe, an engine, a teacher or a device that has changed since is measured again; the digest says so.
    """
    from raydfkd.bench.engine import measured_with
    from raydfkd.bench.quality import Cell, markdown
    from raydfkd.bench.quality import bench_quality as measure

    changes = tuple(overrides or ())
    for recipe in recipes:
        load(recipe, overrides, None)
    cells = [
        Cell(recipe=recipe, budget_s=seconds, seed=number, split=split, overrides=changes)
        for recipe in recipes
        for number in seed or [0]
        for seconds in sorted(budget or [60.0])
    ]
    found = []
    for result in measure(cells, out.expanduser(), at_once=at_once):
        found.append(result)
        line = (
            json.dumps(asdict(result)) if as_json else f"{result.student_top1:.1%}   {result.digest}   {result.command}"
        )
        typer.echo(line, err=not as_json)
    if not as_json:
        typer.echo(f"{measured_with('auto')}\n\n{markdown(found)}")
    return DONE


@bench.command("methods")
def bench_methods(  # noqa: PLR0913, PLR0917 - one option each
    methods: Annotated[
        list[str] | None,
        typer.Argument(metavar="[METHOD]...", help="Packaged methods, or recipes of which the method counts [all]."),
    ] = None,
    teacher: Annotated[str, typer.Option(help="Recipe whose teacher, student and real data are taken.")] = ...,  # type: ignore[assignment]  # typer's form of a required option
    budget: Annotated[str, typer.Option(help="Device-seconds for synthesis and student: 360s, 6m, 1h.")] = "360s",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ... of each method.")] = 1,
    seed: Annotated[list[int] | None, typer.Option(help="These seeds instead; repeatable.")] = None,
    split: Annotated[
        Literal["validation", "test"], typer.Option(help="validation to choose by, test to judge once.")
    ] = "validation",
    full: Annotated[bool, typer.Option("--full", help="The whole budget only, not a quarter and half of it.")] = False,
    out: Annotated[Path, typer.Option(help="Results and teachers; the same folder resumes.")] = Path("runs/methods"),
    at_once: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 1,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> int:
    """Methods side by side on one teacher, for equal device-seconds, between two controls.

    The controls are noise and random real images, both with the teacher's answers. A quarter and half of the budget
    are runs of their own.
    """
    from raydfkd.bench.engine import measured_with
    from raydfkd.bench.methods import SHARES, Comparison, methods_named
    from raydfkd.bench.methods import bench_methods as measure

    load(teacher, overrides, None)
    comparison = Comparison(
        recipe=teacher,
        methods=methods_named(methods or []),
        budget_s=seconds_of(budget, "--budget"),
        seeds=tuple(seed or range(seeds)),
        split=split,
        shares=(1.0,) if full else SHARES,
        overrides=tuple(overrides or ()),
    )

    def told(result: Result) -> None:
        typer.echo(f"{result.student_top1:.1%}   {result.digest}   {result.command}", err=True)

    found = measure(comparison, out.expanduser(), at_once=at_once, told=told)
    typer.echo(found.to_json() if as_json else f"{measured_with('auto')}\n\n{found.markdown()}")
    return DONE


@bench.command("zoo")
def bench_zoo(  # noqa: PLR0913, PLR0917 - one option each
    teachers: Annotated[list[str] | None, typer.Argument(metavar="[TEACHER]...", help="Teachers [all].")] = None,
    budget: Annotated[str, typer.Option(help="Device-seconds for synthesis and student: 600s, 10m.")] = "600s",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ... of each.")] = 1,
    student: Annotated[
        Literal["half", "chosen", "both"], typer.Option(help="Half of the teacher, what init chooses, or both.")
    ] = "both",
    split: Annotated[
        Literal["validation", "test"], typer.Option(help="validation to choose by, test to judge once.")
    ] = "validation",
    method: Annotated[
        list[str] | None, typer.Option(help="A packaged method beside the one that init chooses; repeatable.")
    ] = None,
    controls: Annotated[bool, typer.Option(help="Real images and noise with the teacher's answers too.")] = True,
    out: Annotated[Path, typer.Option(help="Results and teachers; the same folder resumes.")] = Path("runs/zoo"),
    at_once: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 1,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> int:
    """Recipes that init writes, on teachers of many kinds: student accuracy for equal device-seconds.

    Teachers are trained here, in a minute or a few each. Those on which methods were chosen and those on which they are
    judged are summed up apart.
    """
    from raydfkd.bench.engine import measured_with
    from raydfkd.bench.zoo import STUDENTS, TEACHERS, Visit, markdown, to_json, visit_zoo

    visit = Visit(
        teachers=tuple(teachers or TEACHERS),
        budget_s=seconds_of(budget, "--budget"),
        seeds=tuple(range(seeds)),
        split=split,
        students=STUDENTS if student == "both" else (student,),
        controls=controls,
        methods=tuple(method or ()),
        overrides=tuple(overrides or ()),
    )

    def told(row: ZooRow) -> None:
        result = row.result
        typer.echo(f"{row.teacher}   {row.student}   {row.method}   {result.student_top1:.1%}", err=True)

    rows = visit_zoo(visit, out.expanduser(), at_once=at_once, told=told)
    typer.echo(to_json(rows) if as_json else f"{measured_with('auto')}\n\n{markdown(rows)}")
    return DONE


def _print_rows(rows: Iterable[Row], device: str, *, is_json: bool) -> int:
    from raydfkd.bench.engine import engine, measured_with
    from raydfkd.bench.table import table

    found = []
    for row in rows:
        found.append(row)
        if is_json:
            typer.echo(row.to_json(**engine()))
    if not is_json:
        typer.echo(f"{measured_with(device)}\n\n{table(found)}")
    return DONE
