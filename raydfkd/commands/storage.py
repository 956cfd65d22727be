"""Commands for a transfer set: verify, gc."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from raydfkd.commands.options import AsJson, Overrides, RunDir, Source, load
from raydfkd.commands.output import DONE, INCOMPLETE, complain
from raydfkd.errors import RecipeError
from raydfkd.report.redaction import redacted

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def verify(recipe: Source, overrides: Overrides = None, run_dir: RunDir = None, as_json: AsJson = False) -> int:
    """Read everything that is committed; damaged units are taken out of the set, and `run` makes them again."""
    plan = load(recipe, overrides, run_dir)
    from raydfkd.job import open_job

    job = open_job(plan)
    images, whole, beyond, damaged = 0, 0, 0, {}
    with _no_warnings("raydfkd.data.commit_log"):  # of damage, which is said here
        for verdict in job.transfer_set.verify():
            images += verdict.images
            if verdict.damage is not None:
                damaged[verdict.unit] = verdict.damage
                complain(f"unit {verdict.unit}: {verdict.damage}")
            elif verdict.unit in job.unit_ids:
                whole += 1
            else:
                beyond += 1
    if as_json:
        found = {"units": whole, "planned": len(job.units), "beyond": beyond, "images": images, "damaged": damaged}
        typer.echo(json.dumps(found))
    else:
        more = f" and {beyond} beyond this plan" if beyond else ""
        there = f"{whole} of {len(job.units)} units{more} are there and whole, {images:,} images"
        typer.echo(f"{there}; {len(damaged)} damaged")
    return INCOMPLETE if damaged else DONE


@contextmanager
def _no_warnings(name: str) -> Iterator[None]:
    """Have the logger of that name say nothing below an error."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def gc(
    recipe: Source,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Least age, such as 90m, 24h or 7d: longer than a unit ever takes.")
    ] = "24h",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: AsJson = False,
) -> int:
    """Remove what dead attempts left in the transfer set; may run beside workers and readers."""
    age_s = _seconds(older_than)
    plan = load(recipe, overrides, run_dir)
    from raydfkd.data.garbage import collect_garbage
    from raydfkd.job import open_job

    found = collect_garbage(open_job(plan).transfer_set, older_than_s=age_s, dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps({"paths": found.paths, "bytes": found.bytes, "dry_run": dry_run}))
        return DONE
    if dry_run:
        for path in found.paths:
            typer.echo(path)
    verb = "would be removed" if dry_run else "removed"
    typer.echo(
        f"{len(found.paths)} objects, {found.bytes / 2**20:.1f} MiB {verb} from {redacted(plan.transfer_set.uri)}"
    )
    return DONE


def _seconds(age: str) -> int:
    match = re.fullmatch(r"(\d+)([smhd])", age)
    if match is None:
        raise RecipeError(f"--older-than is {age!r}; give a number of s, m, h or d, such as 24h")
    return int(match[1]) * SECONDS[match[2]]
