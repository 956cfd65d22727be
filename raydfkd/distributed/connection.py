"""The connection of a driver to Ray: which cluster it joins, or one of its own, and how that ends."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray

from raydfkd.distributed import ray_internals
from raydfkd.distributed.ray_internals import Answer
from raydfkd.distributed.room import Say, capacity
from raydfkd.errors import RecipeError, last_line

logger = logging.getLogger(__name__)
ANSWER_S = 4.0
"""Seconds that a head may take to answer, asked again as while it starts or its port is moved."""
LOOK_EVERY_S = 5.0
"""Seconds between looks whether the head is still there."""


@contextlib.contextmanager
def connected(address: str, say: Say) -> Iterator[None]:
    """Be connected to Ray meanwhile: to the cluster at ``address``, or as that of the process already is.

    Where it is ``auto``, that is the cluster that RAY_ADDRESS names, else the one that `ray start` has put on record on
    this machine, if it answers, else one that is started here and ends with the connection.

    What Ray prints of nodes goes to standard error, since standard output is for what a command answers.

    Raises:
        RecipeError: the cluster that was named does not answer, or will not have this process.
    """
    with contextlib.redirect_stdout(sys.stderr):
        if ray.is_initialized():
            yield
            return
        _connect(address, say)
        try:
            with _watched_head(say):
                yield
        finally:
            if ray_internals.is_own_cluster():
                ray_internals.end_own_cluster()
            else:
                ray.shutdown()


def _connect(address: str, say: Say) -> None:
    ray_internals.quieten()
    joined = _cluster_to_join(address, say)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if joined is None:
        options["_temp_dir"] = _temp_dir(say)
    try:
        with _deaf_children(), ray_internals.no_sigterm_handler(), ray_internals.short_tmpdir():
            ray.init("local" if joined is None else joined, **options)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        if joined is None:
            raise RecipeError(
                f"runtime.address is {address!r}, but Ray does not start here ({last_line(error)}); "
                "--on local does without it"
            ) from error
        raise RecipeError(
            f"{_how_named(address, joined)}: that cluster does not take this process in ({last_line(error)}); "
            "drivers run on one of its nodes: `raydfkd submit` sends the run there"
        ) from error
    has = capacity()
    say("ray", f"{ray.__version__}   {has['CPU']:g} CPUs   {has['GPU']:g} GPUs")


@contextlib.contextmanager
def _deaf_children() -> Iterator[None]:
    """Let the processes that are started meanwhile, and theirs, never hear SIGTERM.

    `scancel`, systemd and `timeout` send SIGTERM to every process of a job. Ray's would end at once, and with them the
    work that this process is given seconds to save. They end when this process does, by Ray's own means. Ray does the
    same about Ctrl-C. This process hears a SIGTERM that comes meanwhile at the latest afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _cluster_to_join(address: str, say: Say) -> str | None:
    """``host:port`` of a head that answered, or None where a cluster is to be started here.

    Raises:
        RecipeError: the head that was named does not answer.
    """
    named = _named(address)
    if named == "local":
        return None
    if named is None:
        recorded = ray_internals.recorded_address()
        if recorded is None:
            return None
        answer = _ask(recorded)
        if answer.kind == "ready" and answer.version == ray.__version__:
            return recorded
        why = {"token": "wants another token", "silent": "does not answer", "ready": f"has Ray {answer.version}"}
        say("ray", f"the cluster on record at {recorded} {why[answer.kind]}; one is started here for this run")
        return None
    said = _how_named(address, named)
    host, _, port = named.rpartition(":")
    if "://" in named or not host or not port.isdigit():
        raise RecipeError(
            f"{said}; to join a cluster give HOST:PORT of its head, such as head:6379, on one of its nodes; "
            "`raydfkd submit` takes the dashboard's http://head:8265"
        )
    answer = _ask(named)
    if answer.kind == "token":
        raise RecipeError(
            f"{said}: that cluster wants another token; put its into RAY_AUTH_TOKEN or ~/.ray/auth_token "
            "(`ray get-auth-token` on its head prints it)"
        )
    if answer.kind == "silent":
        raise RecipeError(
            f"{said}: no Ray cluster answers there ({answer.reason}); {_remedy(address)}, and one is started here"
        )
    if answer.version != ray.__version__:
        raise RecipeError(f"{said}: that cluster has Ray {answer.version}, this machine {ray.__version__}; install its")
    return named


def _named(address: str) -> str | None:
    """The address that a person gave, in the recipe or the environment."""
    if address != "auto":
        return address
    found = os.environ.get("RAY_ADDRESS", "")
    return None if found in ("", "auto") else found


def _how_named(address: str, named: str) -> str:
    return f"RAY_ADDRESS is {named!r}" if address == "auto" else f"runtime.address is {named!r}"


def _remedy(address: str) -> str:
    return "unset it" if address == "auto" else "use auto"


def _ask(address: str) -> Answer:
    """Ask a head until it answers or :data:`ANSWER_S` are over, without a token first and with it where it wants one.

    A driver with a token does not understand the workers of a cluster without, so the token is shown on demand only.
    """
    until = time.monotonic() + ANSWER_S
    while True:
        answer = ray_internals.ask_head(address, timeout_s=ANSWER_S)
        if answer.kind == "token" and "RAY_AUTH_MODE" not in os.environ and ray_internals.has_token():
            ray_internals.show_token()
            answer = ray_internals.ask_head(address, timeout_s=ANSWER_S)
            if answer.kind != "ready":
                ray_internals.hide_token()
        if answer.kind != "silent" or time.monotonic() > until:
            return answer
        time.sleep(1.0)


def _temp_dir(say: Say) -> str | None:
    """Folder for the sessions of a cluster that is started here, None for Ray's usual one."""
    try:
        found = ray_internals.short_temp_dir()
    except OSError as error:
        variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
        raise RecipeError(
            f"{variable} is {os.environ.get(variable, '')!r}, too long a path for Ray's sockets, and {error}; "
            "set RAY_TMPDIR to a shorter folder of yours"
        ) from None
    if found is not None:
        say("ray", f"the temporary folder is too long a path for Ray's sockets, so they are in {found}")
    return found


@contextlib.contextmanager
def _watched_head(say: Say) -> Iterator[None]:
    """Say so when the head of the cluster stops answering, since Ray ends the process a minute later without a word."""
    address, is_over = ray.get_runtime_context().gcs_address, threading.Event()

    def watch() -> None:
        is_silent = False
        while not is_over.wait(LOOK_EVERY_S):
            was_silent = is_silent
            is_silent = _is_gone(address, is_over) if not was_silent else not _is_there(address)
            if is_silent and not was_silent and not is_over.is_set():
                say(
                    "ray",
                    f"the cluster's head at {address} does not answer; unless it does within a minute Ray ends this "
                    "process. What was committed stays, and the same command goes on from there",
                )
            elif was_silent and not is_silent:
                say("ray", "the cluster's head answers again")

    watcher = threading.Thread(target=watch, name="head-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join(2 * ANSWER_S)


def _is_there(address: str) -> bool:
    return ray_internals.ask_head(address, timeout_s=ANSWER_S).kind != "silent"


def _is_gone(address: str, is_over: threading.Event) -> bool:
    """Whether the head is silent twice, a while apart: a busy one may be late once."""
    return not _is_there(address) and not is_over.wait(LOOK_EVERY_S) and not _is_there(address)
