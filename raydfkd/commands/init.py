"""Command that writes a recipe for a teacher: init."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from raydfkd.commands.options import allow_code, seconds_of
from raydfkd.commands.output import DONE
from raydfkd.config.load import expand_home, yaml_value
from raydfkd.errors import RecipeError


def init(  # noqa: PLR0913, PLR0917 - one option each
    network: Annotated[
        str,
        typer.Option(help="The teacher: module:callable, timm:NAME, torchvision:NAME, hf:FOLDER, torchhub:REPO:NAME."),
    ],
    weights: Annotated[
        str | None, typer.Option(help="File of its weights; those that it comes with unless given.")
    ] = None,
    options: Annotated[str, typer.Option(help="Keyword arguments of its constructor, e.g. '{width: 32}'.")] = "{}",
    size: Annotated[str | None, typer.Option(help="Pixels of its images, 32 or 96x64, where nothing says so.")] = None,
    mean: Annotated[
        str | None, typer.Option(help="Mean of each channel of images in [0, 1], e.g. 0.49,0.48,0.45.")
    ] = None,
    std: Annotated[
        str | None, typer.Option(help="Standard deviation of each; 0.00392157 for inputs of 0..255.")
    ] = None,
    classes: Annotated[int | None, typer.Option(min=2, help="Number of its classes, where nothing says so.")] = None,
    student: Annotated[str | None, typer.Option(help="The student's network; a small one unless given.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder of labelled pictures that judge, a folder a class.")] = None,
    budget: Annotated[str, typer.Option(help="Time for all of it on this machine: 90s, 30m, 2h.")] = "30m",
    name: Annotated[str | None, typer.Option(help="Names the recipe and its file; the network's unless given.")] = None,
    code: Annotated[
        bool, typer.Option("--allow-code", help="Run code that comes with a hub's repository or an archive.")
    ] = False,
) -> int:
    """Look at a teacher and write a commented recipe for it, which `run` takes as it is."""
    seconds = seconds_of(budget, "--budget")
    given = _given(size, mean, std)
    given |= {"classes": classes} if classes is not None else {}
    given |= {"allow_code": True} if code else {}
    keywords = _mapping(options)
    called = name or re.sub(r"[^A-Za-z0-9._-]+", "-", Path(network.rpartition(":")[2]).stem).strip("-.") or "mine"
    path = Path(f"{called}.yaml")
    if path.exists():
        raise RecipeError(f"{path} is there already; give another --name, or remove it")
    if data is not None and not Path(expand_home(data)).is_dir():
        raise RecipeError(f"--data is {data!r}: no such folder; give one with a folder of pictures for each class")
    allow_code()
    from raydfkd.networks.scout import scout
    from raydfkd.runner.check import check
    from raydfkd.runner.constants import fit_to_pictures, tempered
    from raydfkd.runner.draft import Draft, recipe_of

    found = scout(network, options=keywords, weights=weights, given=given)
    if data is not None:
        data = expand_home(data)
        found = fit_to_pictures(found, data)
    found = tempered(found)
    draft = Draft(
        found=found,
        name=called,
        student={} if student is None else {"network": student},
        data=data,
        command=shlex.join(["raydfkd", *sys.argv[1:]]),
    )
    page = draft.page(seconds)
    notes = check(recipe_of(page), writes_run=False, writes_set=False).notes  # or it is not written
    path.write_text(page, encoding="utf-8")
    for note in (*found.notes, *notes):
        typer.echo(f"note      {note}")
    typer.echo(f"recipe    {path}   look at it, then: raydfkd run {path}")
    return DONE


def _given(size: str | None, mean: str | None, std: str | None) -> dict[str, Any]:
    """What the user knows of the image space."""
    space: dict[str, Any] = {}
    if size is not None:
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", size)
        if match is None:
            raise RecipeError(f"--size is {size!r}; write it as 32, or as 96x64 for height and width")
        height, width = int(match[1]), int(match[2] or match[1])
        space["size"] = height if height == width else [height, width]
    for key, text in (("mean", mean), ("std", std)):
        if text is not None:
            try:
                space[key] = [float(value) for value in text.split(",")]
            except ValueError:
                raise RecipeError(
                    f"--{key} is {text!r}; write a number for each channel, such as 0.5,0.5,0.5"
                ) from None
    return {"image_space": space} if space else {}


def _mapping(text: str) -> dict[str, Any]:
    try:
        options = yaml_value(text)
    except yaml.YAMLError:
        options = None
    except RecipeError as error:
        raise RecipeError(f"--options is {text!r}: {error}") from None
    if not isinstance(options, dict):
        raise RecipeError(f"--options is {text!r}; write it as a mapping, such as '{{width: 32}}'")
    return options
