"""The command that a cluster elsewhere is told to run: made of a recipe here, refused where files would be lost."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from raydfkd.config.load import packaged_path
from raydfkd.config.recipe import Recipe
from raydfkd.config.schema import is_file
from raydfkd.errors import RecipeError
from raydfkd.report.redaction import STORAGE_OPTIONS, redacted

SECRET = re.compile(r"key|secret|token|password|credential", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrypoint:
    """A run as a job of a cluster."""

    name: str
    """Of the job, unique in its cluster."""
    command: str
    """Line of shell that starts in ``working_dir`` on the head."""
    working_dir: Path
    """Folder that is packed and sent along."""
    needs: tuple[str, ...]
    """Files and folders in it that the command reads, relative to it."""
    variables: Mapping[str, str]
    """Environment of driver and workers beside what their nodes have; may hold secrets."""
    recipe: str
    """The recipe's name."""
    run_dir: str
    """Where the report will be, on the cluster."""


def plan_entrypoint(  # noqa: PLR0913 - one option each
    source: str,
    recipe: Recipe,
    *,
    overrides: Sequence[str],
    run_dir: str | None,
    working_dir: Path,
    env: Sequence[str],
    name: str | None,
) -> Entrypoint:
    """The job that runs ``recipe``, which was loaded from ``source`` with ``overrides``, on a cluster.

    Raises:
        RecipeError: a file would not be found there, or what is made there would be lost.
    """
    if not working_dir.is_dir():
        raise RecipeError(f"--working-dir is '{working_dir}': no such folder")
    _refuse_what_stays_behind(recipe)
    _refuse_secrets(overrides)
    needs = []
    if Path(source).is_file() or packaged_path(source) is None:
        source = _inside(working_dir, source)
        needs.append(source)
    needs += [os.path.normpath(path) for path in _files_of(recipe, working_dir) if not _is_elsewhere(path)]
    arguments = ["run", source, "--json", *(("--run-dir", run_dir) if run_dir is not None else ())]
    for override in overrides:
        arguments += ["--set", override]
    return Entrypoint(
        name=_job_name(name, recipe),
        command=shlex.join(["raydfkd", *arguments]),
        working_dir=working_dir,
        needs=tuple(needs),
        variables=_variables(env),
        recipe=recipe.name,
        run_dir=recipe.run_dir,
    )


def _refuse_what_stays_behind(recipe: Recipe) -> None:
    """A job's folder on the cluster goes with the job."""
    if not _is_elsewhere(recipe.run_dir):
        raise RecipeError(
            f"run_dir is {recipe.run_dir!r}, inside the job's own folder, which goes with the job; "
            f"give a folder that every node sees, such as --run-dir /runs/{recipe.name}"
        )
    if not _is_elsewhere(recipe.transfer_set.uri):
        raise RecipeError(
            f"transfer_set.uri is {recipe.transfer_set.uri!r}, inside the job's own folder, which goes with the job; "
            "give a URL, or a folder that every node sees"
        )


def _files_of(recipe: Recipe, working_dir: Path) -> Iterator[str]:
    """Files and folders of networks and pictures that the run reads; networks in ``working_dir`` relative to it."""
    yield from recipe.picture_folders.values()
    trained = [recipe.teacher, *([] if recipe.verifier is None else [recipe.verifier])]
    yield from (spec.weights for spec in trained if is_file(spec.weights))
    if recipe.synthesis.embeddings is not None:
        yield recipe.synthesis.embeddings
    folder = Path(os.path.abspath(working_dir))
    for network in (*(spec.network for spec in trained), recipe.student.network):
        path = Path(network.partition(":")[2])
        if path.is_absolute() and path.is_relative_to(folder):  # as loading a recipe leaves what was relative in it
            yield str(path.relative_to(folder))


def _is_elsewhere(path: str) -> bool:
    return "://" in path or Path(path).is_absolute()


def _refuse_secrets(overrides: Sequence[str]) -> None:
    for override in overrides:
        key = override.partition("=")[0]
        is_option = STORAGE_OPTIONS in override and SECRET.search(override) is not None
        if is_option or redacted(override) != override:
            raise RecipeError(
                f"--set {key}: a job's command is shown to everyone; leave credentials to the nodes' environment, "
                "or name a variable of yours with --env"
            )


def _inside(working_dir: Path, source: str) -> str:
    """The recipe file as it is called from the working directory."""
    path = Path(os.path.abspath(source))  # a link is packed as what it leads to, under its own name
    folder = Path(os.path.abspath(working_dir))
    if not path.is_relative_to(folder):
        raise RecipeError(f"{source} is not inside --working-dir {working_dir}, so it would not be sent; move either")
    return str(path.relative_to(folder))


def _variables(names: Sequence[str]) -> dict[str, str]:
    for name in names:
        if name not in os.environ:
            raise RecipeError(f"--env {name}: not set here; export it first, or leave it to the nodes' environment")
    return {name: os.environ[name] for name in names}


def _job_name(given: str | None, recipe: Recipe) -> str:
    if given is None:
        return f"{recipe.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", given):
        raise RecipeError(f"--name is {given!r}; use letters, digits, dash, dot and underscore")
    return given
