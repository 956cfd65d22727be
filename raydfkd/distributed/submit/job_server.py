"""Runs as jobs of a Ray cluster elsewhere: submitted, followed, asked about, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from raydfkd.distributed.ray_internals import has_token, quieten, show_token
from raydfkd.distributed.submit.entrypoint import Entrypoint
from raydfkd.distributed.submit.working_dir import EXCLUDES
from raydfkd.errors import RecipeError, last_line

CONNECT_S, ANSWER_S = 10.0, 300.0
"""Seconds in which a connection has to stand, and an answer to come; sending a package is one of those."""
POLL_S = 1.0
SAVE_S = 60
"""Seconds that a job has from SIGTERM to its end; Ray's own are 3, too few to save a student."""
AWAY_S = 60.0
"""Seconds that the head may be out of reach before nobody follows any longer."""
BEGIN_S = 60.0
"""Seconds that a head may take from its first answer until it takes jobs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """A job as its cluster knows it."""

    name: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    recipe: str
    """Name of its recipe; empty for a job that ``raydfkd submit`` did not submit."""
    run_dir: str
    """On the cluster."""
    started: float
    """Unix time in seconds."""
    seconds: float
    """Until its end, or until now."""
    exit_code: int | None
    """Of its command, None as long as that has not ended by itself."""
    message: str
    """What Ray says about it, in one line."""

    @property
    def has_ended(self) -> bool:
        """Whether nothing will come of it any more."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


class JobClient(Protocol):
    """The part of Ray's ``JobSubmissionClient`` that is used."""

    def submit_job(
        self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any], metadata: dict[str, str]
    ) -> str:
        """Start a job."""
        ...

    def get_job_info(self, job_id: str) -> Any:
        """Its ``JobDetails``."""
        ...

    def list_jobs(self) -> list[Any]:
        """``JobDetails`` of all jobs."""
        ...

    def get_job_logs(self, job_id: str) -> str:
        """All that it printed."""
        ...

    def tail_job_logs(self, job_id: str) -> Any:
        """An async generator of what it prints, from the beginning to its end."""
        ...

    def stop_job(self, job_id: str) -> bool:
        """Begin to stop it."""
        ...


def connect(address: str | None) -> JobServer:
    """The job server at ``http://host:8265``, or the one that RAY_API_SERVER_ADDRESS or RAY_ADDRESS names.

    Raises:
        RecipeError: none is there, or it wants another token.
    """
    named = (address, os.environ.get("RAY_API_SERVER_ADDRESS"), os.environ.get("RAY_ADDRESS"))
    found = next((url for url in named if url and (url == address or url.startswith("http"))), None)
    if found is None:
        raise RecipeError("--address is missing; give the cluster's dashboard, such as http://head:8265")
    if not found.startswith(("http://", "https://")):
        raise RecipeError(f"--address is {found!r}; give the cluster's dashboard, such as http://head:8265")
    os.environ["RAY_API_SERVER_ADDRESS"] = found  # which Ray's client takes in place of its argument
    quieten()
    if has_token():
        show_token()
    with _in_one_line(found):
        return JobServer(_ImpatientClient(found), found)


class _ImpatientClient(JobSubmissionClient):
    """Ray's client, which by itself waits for minutes for a machine that is not there."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=(CONNECT_S, ANSWER_S), **options)


class JobServer:
    """The jobs of a cluster.

    Every method raises RecipeError where the cluster is out of reach, wants another token or does not know the job.
    """

    def __init__(self, client: JobClient, address: str, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._client = client
        self.address = address
        self._sleep = sleep

    def submit(self, entrypoint: Entrypoint) -> None:
        """Send the working directory, and start the command in it."""
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(SAVE_S), **entrypoint.variables}
        environment = {
            "working_dir": str(entrypoint.working_dir),
            "excludes": list(EXCLUDES),
            "env_vars": variables,
        }
        start = partial(
            self._client.submit_job,
            entrypoint=entrypoint.command,
            submission_id=entrypoint.name,
            runtime_env=environment,
            metadata={"recipe": entrypoint.recipe, "run_dir": entrypoint.run_dir},
        )
        with _in_one_line(self.address, entrypoint.name):
            self._once_ready(start)

    def _once_ready(self, start: Callable[[], object]) -> None:
        """Call ``start`` until a head that has just begun, and refuses without its own agent, takes it."""
        until = time.monotonic() + BEGIN_S
        while True:
            try:
                start()
                return
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > until:
                    raise
            self._sleep(POLL_S)

    def job(self, name: str) -> JobState:
        """One job."""
        with _in_one_line(self.address, name):
            return _state_of(self._client.get_job_info(name))

    def jobs(self) -> list[JobState]:
        """All that were submitted and are remembered, the latest last."""
        with _in_one_line(self.address):
            jobs = [_state_of(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(jobs, key=lambda job: job.started)

    def log(self, name: str) -> str:
        """All that a job printed."""
        with _in_one_line(self.address, name):
            return self._client.get_job_logs(name)

    def follow(self, name: str) -> Iterator[str]:
        """Whole lines as a job prints them, from the first one to its end, over lost connections."""
        self.job(name)
        num_seen, heard = 0, time.monotonic()
        while True:
            is_lost = False
            with contextlib.closing(self._lines(name)) as lines:
                try:
                    for index, line in enumerate(lines):
                        if index >= num_seen:
                            num_seen = index + 1
                            yield line
                        heard = time.monotonic()
                except (aiohttp.ClientError, OSError, RuntimeError):
                    is_lost = True
            try:
                has_ended = self.job(name).has_ended
                heard = time.monotonic()
            except RecipeError:
                if time.monotonic() - heard > AWAY_S:
                    raise
                has_ended = False
            if has_ended:
                if is_lost:
                    yield from self.log(name).splitlines()[num_seen:]
                return
            self._sleep(POLL_S)

    def _lines(self, name: str) -> Generator[str, None, None]:
        """Lines of one connection."""
        chunks = self._client.tail_job_logs(name)
        rest = ""

        async def next_chunk() -> str | None:
            return await anext(chunks, None)

        async def close() -> None:
            await chunks.aclose()

        with asyncio.Runner() as runner:
            try:
                while (chunk := runner.run(next_chunk())) is not None:
                    *lines, rest = (rest + chunk).split("\n")
                    yield from lines
                if rest:
                    yield rest
            finally:
                runner.run(close())

    def stop(self, name: str) -> JobState:
        """Have a job save what it has and end, which it is granted ``SAVE_S`` for; its state afterwards."""
        job = self.job(name)
        if not job.has_ended:
            with _in_one_line(self.address, name):
                self._once_ready(partial(self._client.stop_job, name))
        return self.ended(name, within_s=2 * SAVE_S)

    def ended(self, name: str, *, within_s: float) -> JobState:
        """A job's state once it has ended, or after ``within_s``."""
        until = time.monotonic() + within_s
        while not (job := self.job(name)).has_ended and time.monotonic() < until:
            self._sleep(POLL_S)
        return job


def report_in(line: str) -> dict[str, Any] | None:
    """The report, if this line of a job's log is the one that ``raydfkd run --json`` ends with."""
    if not line.startswith("{"):
        return None
    with contextlib.suppress(ValueError):
        found = json.loads(line)
        if {"teacher", "student", "agreement", "recipe_digest"} <= found.keys():
            return dict(found)
    return None


def _state_of(details: Any) -> JobState:
    metadata = details.metadata or {}
    started = (details.start_time or 0) / 1000
    ended = details.end_time / 1000 if details.end_time else time.time()
    return JobState(
        name=details.submission_id or details.job_id,
        status=str(getattr(details.status, "value", details.status)),
        recipe=metadata.get("recipe", ""),
        run_dir=metadata.get("run_dir", ""),
        started=started,
        seconds=max(0.0, ended - started) if started else 0.0,
        exit_code=details.driver_exit_code,
        message=(details.message or "").strip().partition("\n")[0],
    )


@contextlib.contextmanager
def _in_one_line(address: str, name: str | None = None) -> Iterator[None]:
    """Turn what can go wrong between here and a cluster into one line with the remedy."""
    try:
        yield
    except AuthenticationError:
        raise RecipeError(
            f"{address} wants another token; put the cluster's into RAY_AUTH_TOKEN or ~/.ray/auth_token "
            "(`ray get-auth-token` on its head prints it)"
        ) from None
    except (ConnectionError, requests.RequestException):
        raise RecipeError(
            f"{address}: no Ray cluster answers there; is --address its dashboard's, and is its port forwarded to here?"
        ) from None
    except RuntimeError as error:
        said = str(error)
        if "already exists" in said:
            raise RecipeError(
                f"--name is {name!r}: the cluster has a job of that name; give another, or see `raydfkd status {name}`"
            ) from None
        if "404" in said:
            raise RecipeError(f"{address} has no job {name!r}; `raydfkd status` lists those it has") from None
        raise RecipeError(f"{address} refuses: {last_line(error)}") from None
