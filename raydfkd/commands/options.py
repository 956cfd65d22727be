"""Arguments of commands: a recipe with changes to it, and the options that several of them share."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from raydfkd.commands.completion import complete_override, complete_recipe
from raydfkd.config.load import expand_home, load_recipe
from raydfkd.config.recipe import Recipe
from raydfkd.config.static_check import static_check
from raydfkd.errors import RecipeError

Source = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file, or the name of a packaged recipe or job (`raydfkd show`).",
        autocompletion=complete_recipe,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change the recipe, e.g. --set seed=1.", autocompletion=complete_override
    ),
]
RunDir = Annotated[str | None, typer.Option(help="Folder of reports, student and checkpoints.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on the last line.")]
On = Annotated[Literal["ray", "local"] | None, typer.Option("--on", help="Where to work; the recipe says otherwise.")]


def load(source: str, overrides: list[str] | None, run_dir: str | None, on: str | None = None) -> Recipe:
    """A recipe without a mistake that it shows by itself; from here on its code may run."""
    plan = read(source, overrides, run_dir, on)
    static_check(plan)
    allow_code()
    return plan


def load_run(source: str, overrides: list[str] | None, run_dir: str | None) -> Recipe:
    """The recipe of a run by its folder, wherever that is by now, or as ``load`` takes it."""
    folder = Path(expand_home(source))
    if not folder.is_dir():
        return load(source, overrides, run_dir)
    if not (folder / "recipe.yaml").is_file():
        raise RecipeError(f"{source}: a folder without recipe.yaml; give the run_dir of a run, or a recipe")
    plan = load(str(folder / "recipe.yaml"), overrides, run_dir)
    return plan if run_dir is not None else plan.moved_to(str(folder))


def allow_code() -> None:
    """Let ``module:callable`` find modules of the current folder, as with ``python -m``."""
    sys.path.insert(0, os.getcwd())


def read(
    source: str, overrides: list[str] | None, run_dir: str | None, on: str | None = None, *, is_trusted: bool = True
) -> Recipe:
    """A recipe as it is, of which nothing but its form was looked at."""
    given = list(overrides or [])
    if on is not None:
        given.append(f"runtime.executor={on}")
    return load_recipe(source, given, run_dir, is_trusted=is_trusted)


_UNITS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}


def seconds_of(text: str, option: str) -> float:
    """Seconds of a time such as 90s, 30m or 2h, given as ``option``.

    Raises:
        RecipeError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|m|min|h|)", text)
    if match is None or not float(match[1]):
        raise RecipeError(f"{option} is {text!r}; write it as 90s, 30m or 2h")
    return float(match[1]) * _UNITS[match[2]]
