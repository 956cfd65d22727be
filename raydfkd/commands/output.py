"""Output of commands: exit codes, lines and tables for people."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup
from typing_extensions import override

from raydfkd.report.redaction import redacted

if TYPE_CHECKING:
    from rich.console import Console

DONE, INCOMPLETE, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130


class Commands(TyperGroup):
    """Lists each command with the whole first paragraph of its help, where typer cuts it off at the line's end."""

    @override
    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for command in self.commands.values():
            whole = inspect.cleandoc(command.help or "").partition("\n\n")[0]
            command.short_help = command.short_help or " ".join(whole.split())
        super().format_commands(ctx, formatter)


def complain(text: str) -> None:
    """Write one line to standard error, without secrets."""
    typer.echo(redacted(text), err=True)


def console_for(*, is_json: bool) -> Console:
    """The console that people read: standard error when standard output belongs to a script."""
    from rich.console import Console

    return Console(file=sys.stderr if is_json else sys.stdout)  # whatever is redirected later


def print_summary(console: Console, report: Mapping[str, Any], /, **places: object) -> None:
    """The table of a report, and under it where to look further."""
    from raydfkd.report.page import summary_table

    console.print(summary_table(report))
    if report["student"]["top1"] is None:
        console.print(
            "what the student does on real images nobody has measured: give real_data to judge it", soft_wrap=True
        )
    for warning in report.get("warnings", ()):
        console.print(f"warning   {warning}", highlight=False, soft_wrap=True, markup=False)
    for name, place in places.items():
        console.print(f"{name:9} {place}", highlight=False, soft_wrap=True)
