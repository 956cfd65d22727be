"""Ray told that this spot machine will go, so that its nodes drain before it does.

Neither AWS nor GCP tells Ray. Workers and the training job see that their node drains, save what they have and leave.
Runs once on each machine; in Kubernetes pods SIGTERM does the same. Only Linux shows where Ray's nodes are.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from raydfkd.spot.notices import Notice, Provider

logger = logging.getLogger(__name__)
SILENT_AFTER = 5
"""Looks without an answer before that is said."""
DRAIN_TIMEOUT_S = 15
"""Seconds that a head may take to accept; then it is asked again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayNode:
    """A Ray node of this machine."""

    id: str
    """Hexadecimal."""
    gcs_address: str
    """``host:port`` of its cluster's head."""


def watch(
    cloud: Provider,
    drain: Callable[[Notice], bool],
    *,
    every_s: float,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Wait for the notice and drain once; True if that was accepted before the machine's end.

    Metadata that cannot be read is asked for again, and so is a drain that is not accepted, as while a head restarts.
    """
    failures = 0
    while True:
        began = clock()
        try:
            notice = cloud.notice(every_s)
        except (OSError, ValueError) as error:  # urllib's errors, or JSON that is none
            failures += 1
            if failures == SILENT_AFTER:
                logger.warning("no notices can be read from %s (%s); going on asking", cloud.name, error)
        else:
            if failures >= SILENT_AFTER:
                logger.warning("%s answers again", cloud.name)
            failures = 0
            if notice is not None:
                break
        sleep(max(0.0, every_s - (clock() - began)))
    noticed = clock()
    while True:
        left = notice.seconds - int(clock() - noticed)
        if drain(Notice(reason=notice.reason, seconds=max(0, left))):
            return True
        if left <= 0:
            return False
        sleep(1.0)


def drain_nodes(notice: Notice, nodes: Callable[[], Sequence[RayNode]], ray: Sequence[str]) -> bool:
    """Drain this machine's Ray nodes with the command ``ray``; True if every one was accepted."""
    found = nodes()
    if not found:
        logger.warning("%s in %d s, but no Ray node runs on this machine yet", notice.reason, notice.seconds)
    for node in found:
        reason = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", notice.reason)
        where = ("--address", node.gcs_address, "--node-id", node.id)
        command = [*ray, "drain-node", *where, *reason, "--deadline-remaining-seconds", str(notice.seconds)]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DRAIN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            logger.warning("node %s could not be drained: the head did not answer in time", node.id)
            return False
        if answer.returncode:
            last = (answer.stderr.strip() or answer.stdout.strip() or "no output").splitlines()[-1]
            logger.warning("node %s could not be drained: %s", node.id, last)
            return False
        logger.info("%s: node %s drains, %d s are left", notice.reason, node.id, notice.seconds)
    return bool(found)


RAY = (sys.executable, "-m", "ray.scripts.scripts")
"""The command `ray` of this installation, wherever that is."""


def local_nodes(only: Sequence[str] = (), processes: Path = Path("/proc")) -> list[RayNode]:
    """The Ray nodes that run on this machine, or those of them whose ids are in ``only``.

    Read from the flags of the raylets, so that neither Ray nor its head has to be asked while both may be failing.
    """
    found = []
    for entry in processes.glob("[0-9]*"):
        try:
            flags = _flags((entry / "cmdline").read_bytes())
        except OSError:  # it has ended meanwhile
            continue
        if {"node_id", "gcs-address"} <= flags.keys() and (not only or flags["node_id"] in only):
            found.append(RayNode(id=flags["node_id"], gcs_address=flags["gcs-address"]))
    return found


def _flags(command: bytes) -> Mapping[str, str]:
    """Flags of a raylet by name, none of another process."""
    program, *arguments = command.decode(errors="replace").split("\0")
    if Path(program).name != "raylet":
        return {}
    pairs = (argument.lstrip("-").partition("=") for argument in arguments if "=" in argument)
    return {name: value for name, _, value in pairs}
