"""Command that says what a recipe will take before anything is spent: plan."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raydfkd.commands.options import AsJson, Overrides, Source, load
from raydfkd.commands.output import DONE
from raydfkd.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from raydfkd.runner.simulation import Run


SHARES = (0.5, 0.9)
"""Of simulated runs, that percentiles are of."""


def plan(
    recipe: Source,
    device: Annotated[
        list[str] | None, typer.Option(help="A device of the table; repeatable [default: all of them].")
    ] = None,
    devices: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A table of your own, with prices; the packaged one says how it is written."),
    ] = None,
    fleet: Annotated[
        str | None,
        typer.Option(
            "--simulate",
            metavar="KEY=VALUE,...",
            help="Run the queue in simulated time: nodes=64,preempt_per_hour=0.1,start_s=180.",
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> int:
    """Say what a recipe will take: arithmetic, device-hours, money, bytes on the store. Nothing is run or read.

    Hours are the counted arithmetic over what a device was measured to reach, or is guessed to where the table says so.
    """
    planned = load(recipe, overrides, None)
    from raydfkd.runner.plan import DEVICES, checkpoint_share, devices_in, work_of
    from raydfkd.runner.simulation import Fleet, percentiles

    table = {row.name: row for row in devices_in(devices or DEVICES)}
    for name in device or ():
        if name not in table:
            raise RecipeError(f"--device is {name!r}, which is not in the table; {did_you_mean(name, list(table))}")
    machines = None if fleet is None else Fleet.parse(fleet)
    work, runtime = work_of(planned), planned.runtime
    workers, student_workers = max(1, runtime.workers.max), runtime.student_workers.max
    costs = [work.on(table[name], workers=workers, student_workers=student_workers) for name in device or table]
    runs: dict[str, list[Run]] = {}
    if machines is not None:
        units = planned.plan()
        for cost in costs:
            each = 3600 * cost.synthesis_hours / len(units)
            runs[cost.device.name] = percentiles(units, each, each * checkpoint_share(planned), machines, SHARES)
    if as_json:
        found = {
            name: {f"p{100 * share:.0f}": asdict(run) for share, run in zip(SHARES, some, strict=True)}
            for name, some in runs.items()
        }
        typer.echo(json.dumps({**work.to_json(costs), "simulated": found}))
        return DONE
    typer.echo(
        f"{work.images:,} images x {work.tflop_per_image:.3g} TFLOP = {work.synthesis_pflop:.3g} PFLOP, the student "
        f"{work.student_pflop:.3g} PFLOP\n{work.units:,} units, {work.parts:,} files, "
        f"{work.raw_bytes / 1e9:.3g} GB of pixels and logits before they are encoded"
    )
    typer.echo(f"{'device':14} {'synthesis h':>12} {'student h':>10} {f'{workers} + {student_workers}':>12}   usd")
    for cost in costs:
        note = "" if cost.device.measured else "   efficiency is a guess"
        usd = "-" if cost.usd is None else f"{cost.usd:,.2f}"
        hours = f"{cost.synthesis_hours:12.3g} {cost.student_hours:10.3g} {cost.wall_hours:10.3g} h"
        typer.echo(f"{cost.device.name:14} {hours}   {usd}{note}")
    for name, some in runs.items():
        typer.echo(f"{name}, {fleet}, simulated, for the images alone:")
        for share, run in zip(SHARES, some, strict=True):
            typer.echo(f"  {share:.0%} of runs within {_in_words(run, table[name].usd_per_hour)}")
    return DONE


def _in_words(run: Run, price: float | None) -> str:
    from raydfkd.runner.pace import in_words

    usd = "" if price is None else f", {price * run.machine_s / 3600:,.2f} usd"
    return (
        f"{in_words(run.wall_s)}, {run.machine_s / 3600:.3g} machine-hours{usd}, {run.preemptions} machines taken away "
        f"with {in_words(run.wasted_s)} of work"
    )
