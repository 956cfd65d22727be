"""Command that says what a recipe will take before anything is spent: plan."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raydfkd.commands.options import AsJson, Overrides, Source, load, seconds_of
from raydfkd.commands.output import DONE
from raydfkd.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from raydfkd.config.recipe import Recipe
    from raydfkd.runner.here import Here
    from raydfkd.runner.memory import Memory
    from raydfkd.runner.plan import Cost, Plan
    from raydfkd.runner.simulation import Fleet, Run


SHARES = (0.5, 0.9)
"""Of simulated runs, that percentiles are of."""


def plan(  # noqa: PLR0913, PLR0917 - one option each
    recipe: Source,
    device: Annotated[
        list[str] | None, typer.Option(help="A device of the table; repeatable [default: all of them].")
    ] = None,
    devices: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A table of your own, with prices; the packaged one says how it is written."),
    ] = None,
    measure: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Time some steps on this machine for so long (20s), and add it as `here`."),
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
    """Say what a recipe will take: arithmetic, memory, device-hours, money, bytes on the store. No weights are read.

    Hours are the counted arithmetic over what a device was measured to reach, or is guessed to where the table says so.
    Memory is that of steps on two and on four images, which are made here, drawn out to the recipe's batches; in
    float32, which takes up to twice as much, where this processor has no bfloat16.
    """
    seconds = None if measure is None else seconds_of(measure, "--measure")
    planned = load(recipe, overrides, None)
    from raydfkd.runner.here import time_here
    from raydfkd.runner.memory import memory_of
    from raydfkd.runner.plan import DEVICES, Plan, devices_in, work_of
    from raydfkd.runner.simulation import Fleet

    table = {row.name: row for row in devices_in(devices or DEVICES)}
    for name in device or ():
        if name not in table:
            raise RecipeError(f"--device is {name!r}, which is not in the table; {did_you_mean(name, list(table))}")
    machines = None if fleet is None else Fleet.parse(fleet)
    whole = Plan(recipe=planned, work=work_of(planned), memory=memory_of(planned))
    costs = [whole.on(table[name]) for name in device or table]
    here = None if seconds is None else time_here(planned, seconds)
    if here is not None:
        costs.append(whole.here(here))
    runs = {} if machines is None else _simulated(planned, costs, machines)
    if as_json:
        found = {
            name: {f"p{100 * share:.0f}": asdict(run) for share, run in zip(SHARES, some, strict=True)}
            for name, some in runs.items()
        }
        typer.echo(json.dumps({**whole.to_json(costs), "simulated": found}))
        return DONE
    prices = {cost.device.name: cost.device.usd_per_hour for cost in costs}
    for line in (*_work_lines(whole), *_here_lines(here), *_cost_lines(whole, costs, devices or DEVICES)):
        typer.echo(line)
    for name, some in runs.items():
        typer.echo(f"{name}, {fleet}, simulated, for the images alone:")
        for share, run in zip(SHARES, some, strict=True):
            typer.echo(f"  {share:.0%} of runs within {_in_words(run, prices[name])}")
    return DONE


def _simulated(recipe: Recipe, costs: Sequence[Cost], machines: Fleet) -> dict[str, list[Run]]:
    from raydfkd.runner.plan import checkpoint_share
    from raydfkd.runner.simulation import percentiles

    units, share = recipe.plan(), checkpoint_share(recipe)
    runs = {}
    for cost in costs:
        each = 3600 * cost.synthesis_hours / len(units)
        runs[cost.device.name] = percentiles(units, each, each * share, machines, SHARES)
    return runs


def _work_lines(plan: Plan) -> Iterator[str]:
    work, memory = plan.work, plan.memory
    yield (
        f"{work.images:,} images x {work.tflop_per_image:.3g} TFLOP = {work.synthesis_pflop:.3g} PFLOP, the student "
        f"{work.student_pflop:.3g} PFLOP"
    )
    raw = f" by {work.stored.based_on}, {work.raw_bytes / 1e9:.3g} GB before they are encoded"
    encoding = plan.recipe.transfer_set.encoding.kind
    yield (
        f"{work.units:,} units, {work.parts:,} files, {work.stored.bytes / 1e9:.3g} GB on the store"
        f"{'' if encoding == 'raw' else raw}"
    )
    answers = work.answers
    yield (
        f"the teacher's answers for the student: live {answers.live_pflop:.3g} PFLOP; stored "
        f"{answers.stored_bytes / 1e9:.3g} GB of those; to {answers.views} views of each image (source views) "
        f"{answers.views_pflop:.3g} PFLOP, {answers.views_bytes / 1e9:.3g} GB of memory"
    )
    yield (
        f"a worker takes {_memory(memory.synthesis)}, the student's {_memory(memory.student)}; processes on a CPU "
        f"{_gib(memory.synthesis.on_host)} and {_gib(memory.student.on_host)}"
    )


def _memory(memory: Memory) -> str:
    return f"{_gib(memory.tensors)} for {memory.images:,} images at once"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2g} GiB" if size < 100 * 2**30 else f"{size / 2**30:,.0f} GiB"


def _here_lines(here: Here | None) -> Iterator[str]:
    from raydfkd.devices import device_name
    from raydfkd.runner.pace import in_words

    if here is not None:
        yield (
            f"here: {device_name(here.device)}, {in_words(here.unit_s)} a unit and {in_words(here.student_step_s)} a "
            "step of the student, as timed just now"
        )


def _cost_lines(plan: Plan, costs: Sequence[Cost], table: Path) -> Iterator[str]:
    if all(cost.usd is None for cost in costs):
        yield f"usd: put usd_per_hour into a copy of {table} and give that as --devices FILE"
    both = f"{plan.workers} + {plan.recipe.runtime.student_workers.max}"
    yield f"{'device':14} {'synthesis h':>12} {'student h':>10} {both:>12} {'GiB':>18}   usd"
    for cost in costs:
        notes = "; ".join(filter(None, ["" if cost.device.measured else "efficiency is a guess", cost.misfit]))
        usd = "-" if cost.usd is None else f"{cost.usd:,.2f}"
        hours = f"{cost.synthesis_hours:12.3g} {cost.student_hours:10.3g} {cost.wall_hours:10.3g} h"
        memory = f"{cost.synthesis_gib:.2g} + {cost.student_gib:.2g} of {cost.device.memory_gib:.3g}"
        yield f"{cost.device.name:14} {hours} {memory:>18}   {usd}   {notes}".rstrip()


def _in_words(run: Run, price: float | None) -> str:
    from raydfkd.runner.pace import in_words

    usd = "" if price is None else f", {price * run.machine_s / 3600:,.2f} usd"
    return (
        f"{in_words(run.wall_s)}, {run.machine_s / 3600:.3g} machine-hours{usd}, {run.preemptions} machines taken away "
        f"with {in_words(run.wasted_s)} of work"
    )
