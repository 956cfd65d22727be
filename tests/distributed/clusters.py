"""A cluster on this machine whose nodes come and go, driven from a test; see nodes.py."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
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


def processes(environment: Mapping[str, str], command: bytes) -> list[int]:
    """Ids of the processes of a cluster whose command line begins with ``command``."""
    mark = environment["RAYDFKD_TEST"].encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if (process / "cmdline").read_bytes().startswith(command) and mark in (process / "environ").read_bytes():
                found.append(int(process.name))
    return found
