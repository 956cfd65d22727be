"""Commands for a Ray cluster elsewhere: submit, status, logs, stop."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raydfkd.commands.options import AsJson, Overrides, Source, read
from raydfkd.commands.output import DONE, INCOMPLETE, INTERRUPTED, WRONG_INPUT, complain, console_for, print_summary
from raydfkd.config.static_check import static_check
from raydfkd.distributed.submit.entrypoint import plan_entrypoint

if TYPE_CHECKING:
    from raydfkd.distributed.submit.job_server import JobServer, JobState

Address = Annotated[
    str | None,
    typer.Option(
        help="The cluster's dashboard, http://HEAD:8265 [default: RAY_API_SERVER_ADDRESS, or RAY_ADDRESS if http]."
    ),
]
Job = Annotated[str, typer.Argument(metavar="JOB", help="Name of a job, as `raydfkd status` lists it.")]


def submit(  # noqa: PLR0913 - one option each
    recipe: Source,
    overrides: Overrides = None,
    run_dir: Annotated[str | None, typer.Option(help="Folder on the cluster that every node sees.")] = None,
    address: Address = None,
    working_dir: Annotated[
        Path, typer.Option(help="Folder to send along, where the recipe and its module:callable are.")
    ] = Path(),
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            metavar="NAME",
            help="Send this variable of yours to driver and workers; who may enter the cluster can read it.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", "--submission-id", help="Of the job [default: the recipe's name and the time]."),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow the job to its end.")] = False,
    as_json: AsJson = False,
) -> int:
    """Run a recipe on a Ray cluster, from here; it continues when this command ends."""
    plan, working_dir = read(recipe, overrides, run_dir), working_dir.expanduser()
    entrypoint = plan_entrypoint(
        recipe,
        plan,
        overrides=overrides or (),
        run_dir=run_dir,
        working_dir=working_dir,
        env=env or (),
        name=name,
    )
    from raydfkd.distributed.submit.job_server import connect

    static_check(plan)
    from raydfkd.distributed.submit.working_dir import check_package, in_mib, package_of

    package = package_of(working_dir)
    check_package(package, working_dir, entrypoint.needs)
    server = connect(address)
    _say(f"sending {working_dir.absolute()}: {len(package.files)} files, {in_mib(package.num_bytes)}", is_json=as_json)
    if package.withheld:
        _say(f"not sent, as it may hold credentials: {_some(package.withheld)}", is_json=as_json)
    server.submit(entrypoint)
    if detach:
        state = server.job(entrypoint.name)
        typer.echo(json.dumps(asdict(state)) if as_json else f"{_how_to_follow(state.name, address)}")
        return DONE
    _say(f"job {entrypoint.name}; Ctrl-C only stops following it", is_json=as_json)
    return _follow(server, entrypoint.name, address, is_json=as_json)


def status(
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="Name of a job; all of them unless given.")] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> int:
    """List a cluster's jobs, or tell how one of them is doing."""
    from raydfkd.distributed.submit.job_server import connect

    server = connect(address)
    if job is None:
        _print_jobs(server.jobs(), is_json=as_json)
        return DONE
    state = server.job(job)
    if as_json:
        typer.echo(json.dumps(asdict(state)))
        return DONE
    for key, value in asdict(state).items():
        if value not in (None, ""):
            typer.echo(f"{key:10} {_readable(key, value)}")
    for line in server.log(job).splitlines()[-3:]:
        typer.echo(f"  {line[:200]}")
    return DONE


def logs(
    job: Job,
    follow: Annotated[
        bool, typer.Option("--follow", help="To the job's end, then as `submit`: its report and exit code.")
    ] = False,
    address: Address = None,
    as_json: AsJson = False,
) -> int:
    """Print what a job printed."""
    from raydfkd.distributed.submit.job_server import connect

    server = connect(address)
    if follow:
        return _follow(server, job, address, is_json=as_json)
    typer.echo(server.log(job), nl=False)
    return DONE


def stop(job: Job, address: Address = None, as_json: AsJson = False) -> int:
    """Stop a job, which saves what it has first, and wait until it has; submitted again, the run resumes."""
    from raydfkd.distributed.submit.job_server import connect

    server = connect(address)
    before = server.job(job)
    state = server.stop(job) if not before.has_ended else before
    if as_json:
        typer.echo(json.dumps(asdict(state)))
    elif before.has_ended:
        typer.echo(f"job {job} had ended already ({state.status})")
    else:
        typer.echo(f"job {job}: {state.status}")
    return DONE if state.has_ended else INCOMPLETE


def _follow(server: JobServer, job: str, address: str | None, *, is_json: bool) -> int:
    """Show what a job prints until it ends, then its report; the exit code is the job's."""
    found: dict[str, Any] | None = None
    from raydfkd.distributed.submit.job_server import AWAY_S, report_in

    try:
        for line in server.follow(job):
            report = report_in(line)
            if report is None:
                _say(line, is_json=is_json)
            found = report or found
        state = server.ended(job, within_s=AWAY_S)
    except KeyboardInterrupt:
        complain(_how_to_follow(job, address))
        raise SystemExit(INTERRUPTED) from None  # the job is not, so main() has nothing to say
    if found is not None:
        if is_json:
            typer.echo(json.dumps(found))
        else:
            places = {name: f"{state.run_dir}/{name}" for name in ("report.html", "student.safetensors")}
            print_summary(
                console_for(is_json=False), found, report=places["report.html"], student=places["student.safetensors"]
            )
    return _exit_code(state)


def _exit_code(state: JobState) -> int:
    """The job's exit code, with a line about an end that the job does not explain by itself."""
    if state.status == "STOPPED":
        complain(f"job {state.name} was stopped; what was committed stays, and submitted again it resumes from there")
        raise SystemExit(INTERRUPTED)
    if state.exit_code in (DONE, INCOMPLETE, WRONG_INPUT):
        return state.exit_code
    if state.exit_code == INTERRUPTED:
        raise SystemExit(INTERRUPTED)  # the job has said so
    complain(f"job {state.name}: {state.status}; {state.message or 'Ray does not say why'}")
    return INCOMPLETE


def _say(line: str, *, is_json: bool) -> None:
    typer.echo(line, err=is_json)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _how_to_follow(job: str, address: str | None) -> str:
    where = f" --address {address}" if address else ""
    return f"job {job} goes on; to follow it: raydfkd logs {job} --follow{where}   to end it: raydfkd stop {job}{where}"


def _print_jobs(jobs: list[JobState], *, is_json: bool) -> None:
    if is_json:
        typer.echo(json.dumps([asdict(job) for job in jobs]))
        return
    if not jobs:
        typer.echo("no jobs")
    for job in jobs:
        began, took = _readable("started", job.started), _readable("seconds", job.seconds)
        typer.echo(f"{job.name:40} {job.status:10} {began:18} {took:>9}   {job.recipe}")


def _readable(key: str, value: Any) -> str:
    if key == "started":
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(value)) if value else "-"
    if key == "seconds":
        minutes, seconds = divmod(int(value), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
    return str(value)
