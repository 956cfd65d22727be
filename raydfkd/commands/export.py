"""Commands that hand out what a run has made: export student, export set."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from raydfkd.commands.completion import complete_recipe
from raydfkd.commands.options import AsJson, Overrides, RunDir, load_run
from raydfkd.commands.output import DONE, Commands
from raydfkd.config.load import expand_home
from raydfkd.errors import RecipeError

export = typer.Typer(
    help="Hand out the student, or the transfer set, in forms that need no raydfkd.",
    no_args_is_help=True,
    cls=Commands,
)


class Form(StrEnum):
    """Forms of a student."""

    SAFETENSORS = "safetensors"
    ONNX = "onnx"
    TORCH_EXPORT = "torch_export"
    TIMM = "timm"
    HF = "hf"


Run = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|RUN_DIR",
        help="A recipe, or the folder of a run.",
        autocompletion=complete_recipe,
    ),
]
To = Annotated[str | None, typer.Option(help="Folder or URI to write to [default: RUN_DIR/export].")]


@export.command("student")
def export_student(
    recipe: Run,
    to: To = None,
    form: Annotated[
        list[Form] | None,
        typer.Option("--format", help="Form of it; may be repeated [default: safetensors]."),
    ] = None,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    as_json: AsJson = False,
) -> int:
    """Write the student with a model card, in forms that need no raydfkd; each is compared with the student."""
    plan = load_run(recipe, overrides, run_dir)
    from raydfkd.export.forms import export_student as write

    made = write(plan, expand_home(to or f"{plan.run_dir}/export"), [one.value for one in form or [Form.SAFETENSORS]])
    if as_json:
        typer.echo(json.dumps(made))
        return DONE
    for name, found in made["formats"].items():
        typer.echo(f"{name:13} logits differ by at most {found['max_abs_difference']:.2g}")
    typer.echo(f"{'folder':13} {made['folder']}: {', '.join(made['files'])}")
    return DONE


@export.command("set")
def export_set(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|RUN_DIR|URI",
            help="A recipe, the folder of a run, or where a transfer set lies.",
            autocompletion=complete_recipe,
        ),
    ],
    form: Annotated[
        Literal["parquet", "webdataset", "folder"],
        typer.Option("--format", help="Hugging Face's Parquet of images, tars, or a folder for each class."),
    ] = "parquet",
    to: Annotated[str | None, typer.Option(help="Folder or URI to write to [default: RUN_DIR/export/set].")] = None,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    as_json: AsJson = False,
) -> int:
    """Write the transfer set as pictures with a dataset card, in a layout that other tools read."""
    is_set = "://" in source or Path(expand_home(source), "set.json").is_file()
    if is_set and to is None:
        raise RecipeError(f"--to is missing; say where to write the pictures of {source}")
    plan = None if is_set else load_run(source, overrides, run_dir)
    from raydfkd.export.pictures import pictures_at, pictures_of
    from raydfkd.export.sets import export_set as write

    pictures = pictures_at(expand_home(source)) if plan is None else pictures_of(plan)
    name = source.rstrip("/").rpartition("/")[2] if plan is None else plan.name
    place = to if plan is None or to is not None else f"{plan.run_dir}/export/set"
    made = write(pictures, name, expand_home(str(place)), form)
    typer.echo(
        json.dumps(made) if as_json else f"{made['images']:,} images in {made['files']:,} files   {made['folder']}"
    )
    return DONE
