"""What commands give: exit codes, lines and tables for people."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import typer
from rich.console import Console

DONE, INCOMPLETE, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130


def complain(text: str) -> None:
    """One line on standard error."""
    typer.echo(text, err=True)


def console_for(*, is_json: bool) -> Console:
    """Where people read: standard error when standard output belongs to a script."""
    return Console(file=sys.stderr if is_json else sys.stdout)  # whatever is redirected later


def print_summary(console: Console, report: Mapping[str, Any], /, **places: object) -> None:
    """The table of a report, and under it where to look further."""
    from raydfkd.report.page import summary_table

    console.print(summary_table(report))
    if report["student"]["top1"] is None:
        console.print(
            "what the student does on real images nobody has measured: give real_data to judge it", soft_wrap=True
        )
    for warning in report.get("warnings", ()):  # the report of a cluster may be of an earlier version
        console.print(f"warning   {warning}", highlight=False, soft_wrap=True, markup=False)
    for name, place in places.items():
        console.print(f"{name:9} {place}", highlight=False, soft_wrap=True)
