"""The command line: its commands, and what becomes of errors. Help and typos are instant."""

from __future__ import annotations

import logging
import signal
import sys

import typer

from raydfkd.commands import inspect as inspecting
from raydfkd.commands import jobs as cluster
from raydfkd.commands import node as machine
from raydfkd.commands import run as running
from raydfkd.commands import storage
from raydfkd.commands.bench import bench
from raydfkd.commands.output import DONE, INCOMPLETE, INTERRUPTED, WRONG_INPUT, complain
from raydfkd.errors import RecipeError, StudentDivergedError

app = typer.Typer(
    name="raydfkd",
    help="Data-free knowledge distillation at cluster scale.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    running.run,
    running.teach,
    running.synthesize,
    running.distill,
    running.evaluate,
    inspecting.check,
    inspecting.show,
    inspecting.report,
    storage.verify,
    storage.gc,
    cluster.submit,
    cluster.status,
    cluster.logs,
    cluster.stop,
    machine.node_watch,
):
    app.command()(command)
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point of the console script: turns what went wrong into one line and an exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's way to say Ctrl-C
    try:
        result = app(standalone_mode=False)
    except RecipeError as error:
        for line in error.lines:
            complain(line)
        sys.exit(WRONG_INPUT)
    except StudentDivergedError as error:
        complain(str(error))
        sys.exit(INCOMPLETE)
    except OSError as error:
        from raydfkd.store.errors import StoreError

        if not isinstance(error, StoreError):
            raise
        complain(f"{error}; what was committed stays, and the same command goes on from there")
        sys.exit(INCOMPLETE)
    except (KeyboardInterrupt, typer.Abort):
        result = INTERRUPTED
    except typer.TyperException as error:
        complain(error.format_message())
        sys.exit(WRONG_INPUT)
    if result == INTERRUPTED:  # also what typer makes of Ctrl-C, depending on its version
        complain("interrupted; what was committed stays, and the same command goes on from there")
    sys.exit(result if isinstance(result, int) else DONE)
