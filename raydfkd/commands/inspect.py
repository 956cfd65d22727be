"""Commands that look: check, show, report."""

from __future__ import annotations

import json
from typing import Annotated

import typer
import yaml

from raydfkd.commands.options import AsJson, Overrides, RunDir, Source, allow_code, load, read
from raydfkd.commands.output import DONE, console_for, print_summary
from raydfkd.config.static_check import static_check


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
    plan = read(recipe, overrides, run_dir)
    static_check(plan)
    if not no_code:
        allow_code()
        from raydfkd.runner.check import check as build_everything

        build_everything(plan)
    if as_json:
        typer.echo(json.dumps(plan.shown()))
        return DONE
    units = plan.plan()
    size = f"{len(units)} units, {sum(unit.request.count for unit in units):,} images"
    typer.echo(yaml.safe_dump(plan.shown(), sort_keys=False, default_flow_style=None).rstrip())
    typer.echo(f"# sound: {size}" + ("; networks and files were not looked at" if no_code else ""))
    return DONE


def show(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A family, a plug-in or a recipe.")] = None,
) -> int:
    """List recipes and plug-ins with their options, or explain one of them."""
    from raydfkd.commands.catalog import show as catalog

    for line in catalog(name):
        typer.echo(line)
    return DONE


def report(recipe: Source, overrides: Overrides = None, run_dir: RunDir = None, as_json: AsJson = False) -> int:
    """Write report.html again and print its table; before there is a student, gallery.html of the images so far."""
    plan = load(recipe, overrides, run_dir)
    from raydfkd.runner.run import report_again

    found, page = report_again(plan)
    if as_json:
        typer.echo(json.dumps(found))
    elif "agreement" in found:
        print_summary(console_for(is_json=False), found, report=page)
    else:
        typer.echo(f"gallery   {page}")
    return DONE
