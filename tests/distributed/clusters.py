"""A cluster on this machine whose nodes come and go, driven from a test; see nodes.py."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

NODES = Path(__file__).parent / "nodes.py"
COMMAND = [sys.executable, "-c", "from raydfkd.cli import main; main()"]
"""The command line, as a process of its own."""


class Nodes:
    """The nodes beside the head, which has one CPU and room for nothing else."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(NODES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=dict(environment),
        )
        self.address: str = self._answer()["address"]

    def add(self, **resources: float) -> str:
        """A node with one CPU and ``resources``; its id."""
        node: str = self._ask({"add": resources})["node"]
        return node

    def kill(self, node: str) -> float:
        """Kill all its processes; when."""
        at: float = self._ask({"kill": node})["at"]
        return at

    def drain(self, node: str, seconds: float) -> float:
        """Announce that it will be taken away; when."""
        at: float = self._ask({"drain": node, "seconds": seconds})["at"]
        return at

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _ask(self, command: Mapping[str, object]) -> dict:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict = json.loads(line)
                return answer
        raise AssertionError("the cluster ended")


@contextlib.contextmanager
def cluster(**variables: str) -> Iterator[tuple[Nodes, dict[str, str]]]:
    """A cluster of its own with ``variables`` in its environment, and that environment for its drivers."""
    # a short path, because sockets lie in it; of its own, because "auto" looks for clusters in the common one
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    environment = {**os.environ, **variables, "RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token"}
    environment |= {"RAY_AUTH_TOKEN": uuid.uuid4().hex, "RAYDFKD_TEST": uuid.uuid4().hex}
    environment.pop("RAY_ADDRESS", None)
    nodes = Nodes(environment)
    try:
        yield nodes, {**environment, "RAY_ADDRESS": nodes.address}
    finally:
        nodes.close()
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class Head:
    """A Ray head of its own."""

    address: str
    """``host:port`` for drivers."""
    dashboard: str
    """URL of its job server."""
    environment: dict[str, str]
    """Of commands that are to find it; holds no RAY_AUTH_MODE."""
    process: subprocess.Popen[str]
    """`ray start --block`, which ends all its processes when it ends."""

    def raydfkd(self, *args: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command as a person beside this head gives it."""
        return subprocess.run(
            [*COMMAND, *args],
            cwd=folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def started_head(home: Path, *, num_cpus: int = 4, num_gpus: int = 0, **variables: str) -> Iterator[Head]:
    """`ray start --head` as a person gives it who has run something here before: a token is in HOME."""
    token = home / ".ray" / "auth_token"
    token.parent.mkdir(exist_ok=True)
    token.write_text(secrets.token_hex(32))
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # Ray's sockets need a short path
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
    environment |= {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_TMPDIR": folder,
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_raylet_start_wait_time_s": "180",  # of a machine that has other things to do
    }
    named = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    ports = {name: free_port() for name in named}  # other Rays on this machine have the usual ones
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
    command += [f"--num-cpus={num_cpus}", f"--num-gpus={num_gpus}"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    process = subprocess.Popen(command, env={**environment, **variables}, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert any("Ray runtime started" in line for line in process.stdout), "the head has ended"
        yield Head(
            address=f"127.0.0.1:{ports['port']}",
            dashboard=f"http://127.0.0.1:{ports['dashboard-port']}",
            environment=environment,
            process=process,
        )
    finally:
        process.terminate()
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def processes(environment: Mapping[str, str], command: bytes) -> list[int]:
    """Ids of the processes of a cluster whose command line begins with ``command``."""
    mark = environment["RAYDFKD_TEST"].encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if (process / "cmdline").read_bytes().startswith(command) and mark in (process / "environ").read_bytes():
                found.append(int(process.name))
    return found


def kill_one_at_work(environment: Mapping[str, str]) -> int:
    """Kill an actor that works on a unit, as soon as there is one; returns its process.

    While an actor is asked how far it is, its title does not say that it works.
    """
    while True:
        for process in processes(environment, b"ray::SynthesisActor.run")[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
                return process


def node_of(process: int) -> str:
    """Id of the node whose raylet is the parent of a worker's process; "" for one that has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        parent = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1]
        for argument in Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0"):
            if argument.startswith(b"--node_id="):
                return argument.partition(b"=")[2].decode()
    return ""


def workers_of(node: str, environment: Mapping[str, str], title: bytes) -> list[int]:
    """Processes of a node whose command line begins with ``title``."""
    return [process for process in processes(environment, title) if node_of(process) == node]
