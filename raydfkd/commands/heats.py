"""Command that chooses a method for a teacher without a real image: heats."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raydfkd.commands.options import AsJson, Overrides, Source, load, seconds_of
from raydfkd.commands.output import DONE
from raydfkd.errors import RecipeError

if TYPE_CHECKING:
    from raydfkd.runner.heats import Heat

AS_IT_IS = "as it is"


def heats(
    recipe: Source,
    budget: Annotated[str, typer.Option(help="Device-seconds for all heats together: 300s, 10m, 1h.")] = "10m",
    method: Annotated[
        list[str] | None,
        typer.Option(help="A method to try beside the recipe's own; repeatable [default: some that are unlike]."),
    ] = None,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Write the recipe with the method that won.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> int:
    """Try several methods on the recipe's teacher for a while, half of them for longer, and say which is best.

    No real image is read: students are compared by the evidence that the report's estimate rests on.
    """
    seconds = seconds_of(budget, "--budget")
    own = load(recipe, overrides, None)
    if write is not None and write.exists():
        raise RecipeError(f"--write is {str(write)!r}, which is there already; name another file, or remove it")
    from raydfkd.config.load import load_with_method
    from raydfkd.networks.weights import weights_exist
    from raydfkd.report.page import estimated
    from raydfkd.runner.heats import PORTFOLIO
    from raydfkd.runner.heats import heats as run
    from raydfkd.runner.suits import why_not

    if not weights_exist(own.teacher.weights, where="teacher.weights"):
        raise RecipeError(f"teacher.weights is {own.teacher.weights!r}: no such file; `raydfkd teach` makes it")
    recipes = {AS_IT_IS: own}
    for name in method or PORTFOLIO:
        other = load_with_method(recipe, name, overrides or ())
        other = other.model_copy(update={"teacher": own.teacher})
        reason = why_not(other)
        if not reason:
            recipes[name] = other
        elif method:
            raise RecipeError(f"--method is {name!r}, which does not suit: {reason}")

    def told(heat: Heat) -> None:
        if as_json:
            typer.echo(json.dumps(asdict(heat)), err=True)
            return
        result = heat.estimate.words if not heat.images else f"{estimated(heat.estimate.as_json())} of real images"
        typer.echo(f"round {heat.round}   {heat.seconds:5.0f} s   {heat.method:24} {heat.midst:6.1%}   {result}")

    best = run(recipes, seconds, told=told)
    if write is not None:
        write.write_text(recipes[best].to_yaml(), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps({"best": best, "recipe": None if write is None else str(write)}))
    else:
        typer.echo(f"best      {best}" + ("" if write is None else f"   {write}"))
    return DONE
