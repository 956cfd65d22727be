"""Commands that look: check, show, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raydfkd.commands.completion import complete_name
from raydfkd.commands.options import AsJson, On, Overrides, RunDir, Source, allow_code, load, read
from raydfkd.commands.output import DONE, console_for, print_summary
from raydfkd.config.recipe import Recipe
from raydfkd.config.static_check import static_check
from raydfkd.data.commits import BYTES_BESIDE
from raydfkd.errors import Mistakes, RecipeError

if TYPE_CHECKING:
    from raydfkd.runner.check import Prepared

NOT_LOOKED_AT = "networks, code of yours, weights, names of classes, real data, stores and the device"


def check(
    recipe: Source,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    on: On = None,
    no_code: Annotated[
        bool,
        typer.Option("--no-code", help="Run no code and open no data that the recipe names: for recipes of strangers."),
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Validate a recipe and print it resolved; nothing is made."""
    plan = read(recipe, overrides, run_dir, on, is_trusted=not no_code)
    static_check(plan)
    found = _size_of_set(plan)
    pictures = " and ".join(f"{key} names real pictures" for key in plan.picture_folders)
    if not no_code:
        allow_code()
        prepared = _check_everything(plan)
        found += [*_sizes_of_networks(prepared), *prepared.notes, OTHER_METHODS]
        pictures = prepared.not_data_free or ""
    if pictures:
        found.append(f"not data-free: {pictures}")
    if as_json:
        typer.echo(json.dumps(plan.shown()))
        return DONE
    typer.echo(plan.to_yaml().rstrip())
    for line in found:
        typer.echo(f"# {line}")
    units = plan.plan()
    sound = f"# sound: {len(units)} units, {sum(unit.request.count for unit in units):,} images"
    typer.echo(f"{sound}; {NOT_LOOKED_AT} were not looked at" if no_code else sound)
    return DONE


def _check_everything(plan: Recipe) -> Prepared:
    """Raise every mistake that a run would refuse; a device that only the run's machine has hides no other mistake."""
    from raydfkd.devices import pick_device
    from raydfkd.runner.check import check as build_everything

    mistakes = Mistakes()
    try:
        pick_device(plan.runtime.driver_device)
    except RecipeError as error:
        with mistakes.gathered():
            raise RecipeError(f"{error}, or check with --no-code what is for another machine") from None
        plan = plan.model_copy(update={"runtime": plan.runtime.model_copy(update={"device": "cpu"})})
    with mistakes.gathered():
        prepared = build_everything(plan)
    mistakes.complain()
    return prepared


OTHER_METHODS = "which methods suit the teacher, and why others do not: raydfkd show --for RECIPE"


def _size_of_set(plan: Recipe) -> list[str]:
    """Lines on the classes, images and bytes that the set will have."""
    channels, height, width = plan.made_space.shape
    images = len(plan.classes) * plan.transfer_set.images_per_class
    row = channels * height * width + plan.transfer_set.logits.bytes_of(plan.teacher.classes) + BYTES_BESIDE
    kind = plan.transfer_set.encoding.kind
    stored = "" if kind == "raw" else f" before they are {kind}, which takes less"
    return [
        f"{len(plan.classes):,} classes, {images:,} images of {channels}x{height}x{width}: "
        f"{_in_bytes(images * row)} of pixels and logits{stored}"
    ]


def _sizes_of_networks(prepared: Prepared) -> list[str]:
    from raydfkd.networks.build import count_parameters

    student, teacher = count_parameters(prepared.student), count_parameters(prepared.network)
    said = f"student of {student:,} parameters, teacher of {teacher:,}"
    if not teacher:
        return [said]
    if student > teacher:
        return [f"{said}: the student is {student / teacher:.3g} times as large as what it is to replace"]
    return [f"{said}: the student is {student / teacher:.1%} of it"]


def _in_bytes(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def show(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="A recipe, job, section, option, value, family or plug-in.",
            autocompletion=complete_name,
        ),
    ] = None,
    suiting: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="RECIPE", help="Say which methods suit this recipe's teacher, and why others do not."
        ),
    ] = None,
) -> int:
    """List recipes, sections and plug-ins, or explain one of them, an option or a value."""
    from raydfkd.commands.catalog import show as catalog

    if suiting is not None:
        if name is not None:
            raise RecipeError(f"show {name} --for {suiting}: give one of both")
        plan = load(suiting, None, None)
        from raydfkd.runner.suits import suits

        for method, reason in suits(plan):
            typer.echo(f"{method:24} {reason or 'suits'}")
        return DONE

    if name is not None and ":" in name:
        allow_code()
    for line in catalog(name):
        typer.echo(line)
    return DONE


def report(
    recipe: Source,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    png: Annotated[
        Path | None,
        typer.Option("--png", metavar="FILE", dir_okay=False, help="Write the pictures as one file too, .png or .jpg."),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Write report.html again and print its table; before there is a student, gallery.html of the images so far."""
    plan = load(recipe, overrides, run_dir)
    from raydfkd.runner.run import report_again

    found, page = report_again(plan, png=None if png is None else png.expanduser())
    if as_json:
        typer.echo(json.dumps(found))
    elif "agreement" in found:
        print_summary(console_for(is_json=False), found, report=page)
    else:
        typer.echo(f"gallery   {page}")
    return DONE
