"""The command line: its commands, and what becomes of errors. Help and typos are instant."""

from __future__ import annotations

import logging
import signal
import sys
import traceback
from typing import Annotated

import typer
from typing_extensions import override

from raydfkd import __version__
from raydfkd.commands import inspect as inspecting
from raydfkd.commands import jobs as cluster
from raydfkd.commands import node as machine
from raydfkd.commands import run as running
from raydfkd.commands import storage
from raydfkd.commands.bench import bench
from raydfkd.commands.export import export
from raydfkd.commands.heats import heats
from raydfkd.commands.init import init
from raydfkd.commands.output import DONE, INCOMPLETE, INTERRUPTED, WRONG_INPUT, Commands, complain
from raydfkd.commands.plan import plan
from raydfkd.errors import RecipeError, RunError
from raydfkd.report.redaction import redacted, secrets_of_environment, secrets_of_settings

app = typer.Typer(
    name="raydfkd",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    cls=Commands,
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"raydfkd {__version__}")
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Log more, and show where an error of one line comes from.")
    ] = False,
) -> None:
    """Data-free knowledge distillation at cluster scale."""
    logging.getLogger("raydfkd").setLevel(logging.DEBUG if debug else logging.NOTSET)


for command in (
    init,
    heats,
    plan,
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
app.add_typer(export, name="export")
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point of the console script: turns what went wrong into one line and an exit code."""
    logging.basicConfig(level=logging.WARNING, handlers=[_handler()])
    sys.excepthook = lambda kind, error, trace: _print_traceback(error)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's way to say Ctrl-C
    arguments, is_debug = _without_debug(sys.argv[1:])
    try:
        result = app(["--debug", *arguments] if is_debug else arguments, standalone_mode=False)
    except RecipeError as error:
        _show_origin(error, is_debug=is_debug)
        for line in error.lines:
            complain(line)
        sys.exit(WRONG_INPUT)
    except RunError as error:
        _show_origin(error, is_debug=is_debug)
        complain(str(error))
        sys.exit(INCOMPLETE)
    except OSError as error:
        from raydfkd.store.errors import StoreError

        if not isinstance(error, StoreError):
            raise
        _show_origin(error, is_debug=is_debug)
        complain(f"{error}; what was committed stays, and the same command goes on from there")
        sys.exit(INCOMPLETE)
    except (KeyboardInterrupt, typer.Abort):
        result = INTERRUPTED
    except typer.TyperException as error:
        complain(error.format_message().replace("Value error, ", ""))  # pydantic's words, which typer leaves in
        sys.exit(WRONG_INPUT)
    if result == INTERRUPTED:  # also what typer makes of Ctrl-C, depending on its version
        complain("interrupted; what was committed stays, and the same command goes on from there")
    sys.exit(result if isinstance(result, int) else DONE)


def _without_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """The arguments and whether --debug was among them, which people add at the end of a command that went wrong."""
    rest = [argument for argument in arguments if argument != "--debug"]
    return rest, len(rest) < len(arguments)


def _show_origin(error: BaseException, *, is_debug: bool) -> None:
    """Print the tracebacks of an error and of those that it was made of, which its line leaves out."""
    if not is_debug:
        return
    link: BaseException | None = error
    while link is not None:
        link.__suppress_context__ = link.__cause__ is not None
        link = link.__cause__ or link.__context__
    _print_traceback(error)


def _print_traceback(error: BaseException) -> None:
    """Print a traceback; file systems and Ray, whose errors are in it, know nothing of secrets."""
    typer.echo(_without_secrets("".join(traceback.format_exception(error))), err=True, nl=False)


def _without_secrets(text: str) -> str:
    return redacted(text, {*secrets_of_environment(), *secrets_of_settings(sys.argv)})


class _Formatter(logging.Formatter):
    """Leaves out secrets in what is logged by whatever package."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        return _without_secrets(super().format(record))


def _handler() -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s %(name)s: %(message)s"))
    return handler
