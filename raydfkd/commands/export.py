"""Commands that hand out what a run has made: export student, export set."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from raydfkd.commands.completion import complete_recipe
from raydfkd.commands.options import AsJson, Overrides, RunDir, load_run
from raydfkd.commands.output import DONE, Commands
from raydfkd.config.load import expand_home

export = typer.Typer(
    help="Hand out the student, or the transfer set, in forms that need no raydfkd.",
    no_args_is_help=True,
    cls=Commands,
)
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
        list[Literal["safetensors", "onnx", "torch_export", "timm", "hf"]] | None,
        typer.Option("--format", help="Form of it; may be repeated [default: safetensors]."),
    ] = None,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    as_json: AsJson = False,
) -> int:
    """Write the student with a model card, in forms that need no raydfkd; each is compared with the student."""
    plan = load_run(recipe, overrides, run_dir)
    from raydfkd.export.forms import export_student as write

    made = write(plan, expand_home(to or f"{plan.run_dir}/export"), form or ["safetensors"])
    if as_json:
        typer.echo(json.dumps(made))
        return DONE
    for name, found in made["formats"].items():
        typer.echo(f"{name:13} logits differ by at most {found['max_abs_difference']:.2g}")
    typer.echo(f"{'folder':13} {made['folder']}: {', '.join(made['files'])}")
    return DONE
