"""Every name of Ray's that is not public and that the engine relies on.

Ray may change them in any release. So other modules import them from here, and each has a test of the shape that is
relied on.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grpc
import ray
import ray._raylet
from ray._common.utils import get_default_ray_temp_dir
from ray._private import grpc_utils, state, utils, worker
from ray._private.authentication import authentication_token_setup
from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE, get_runtime_env_default_excludes
from ray._private.runtime_env import packaging
from ray._private.services import psutil  # type: ignore[attr-defined]  # Ray brings it along
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.train.v2._internal.exceptions import (
    CheckpointManagerInitializationError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ReschedulingState
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

__all__ = [
    "CHECKPOINT_MANAGER_SNAPSHOT_FILENAME",
    "CheckpointManagerInitializationError",
    "ControllerCallback",
    "DefaultFailurePolicy",
    "ElasticScalingPolicy",
    "FailureDecision",
    "NoopDecision",
    "ReschedulingState",
    "ResizeDecision",
    "WorkerGroupPollStatus",
    "WorkerGroupStartupTimeoutError",
    "WorkerGroupState",
    "WorkerHealthCheckFailedError",
    "WorkerHealthCheckTimeoutError",
]

RAYLET: Any = ray._raylet  # compiled, so nothing is known of its types
PROTOCOL: Any = gcs_service_pb2  # generated, likewise
CHATTY = (
    "ray._private.authentication",
    "ray._private.runtime_env",
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
)
"""Loggers that tell people Ray's own steps, some of them at levels of their own."""
SESSION = "session_0000-00-00_00-00-00_000000_0000000/sockets/plasma_store.0"
"""As long as the longest path that Ray makes for a socket below its temporary folder."""
LISTENER = "pymp-00000000/listener-00000000"
"""As long as the path that Python's multiprocessing makes for a socket below TMPDIR."""


def quieten() -> None:
    """Hear errors only from Ray while it packs, sends and shows tokens."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)


# Tokens


def has_token() -> bool:
    """Whether a token for clusters is in the environment or in ``~/.ray/auth_token``."""
    loader = RAYLET.AuthenticationTokenLoader.instance()
    loader.reset_cache()
    return bool(loader.has_token(ignore_auth_mode=True))


def show_token() -> None:
    """Have this process and its children show their token to Ray, unless RAY_AUTH_MODE says otherwise.

    Ray reads RAY_AUTH_MODE when it is imported, so to set the variable here would come too late.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        authentication_token_setup._enable_token_auth()


def hide_token() -> None:
    """Undo ``show_token``."""
    os.environ.pop("RAY_AUTH_MODE", None)
    RAYLET.Config.initialize("")


# Heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A head's answer to the question whether it is there."""

    kind: Literal["ready", "token", "silent"]
    """`token`: it is there and wants another token than it was shown. `silent`: no head answered in time."""
    version: str = ""
    """Of Ray there."""
    reason: str = ""
    """Why it is silent."""


def ask_head(address: str, *, timeout_s: float) -> Answer:
    """Ask the head at ``host:port`` whether it is there, as itself and nobody else would answer."""
    channel = grpc_utils.init_grpc_channel(address, options=[("grpc.enable_http_proxy", 0)])
    try:
        stub: Any = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)  # type: ignore[no-untyped-call]  # generated
        found = stub.CheckAlive(PROTOCOL.CheckAliveRequest(), timeout=timeout_s)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            return Answer(kind="token")
        return Answer(kind="silent", reason=error.code().name.lower().replace("_", " "))
    finally:
        channel.close()
    return Answer(kind="ready", version=found.ray_version)


def recorded_address() -> str | None:
    """Address of the head that `ray start` left on record on this machine; it may be gone."""
    address: str | None = utils.read_ray_address()
    return address or None


# The cluster of this process


def is_own_cluster() -> bool:
    """Whether ``ray.init`` of this process started the cluster that it is connected to."""
    node = worker._global_node
    return node is not None and bool(node.ray_init_cluster)


def end_own_cluster() -> None:
    """Disconnect, and end all processes of the cluster that this process started at once.

    ``ray.shutdown`` sends SIGTERM and waits a second for each process. That would be in vain where SIGTERM is blocked,
    and nothing is lost with them. Agents, which the raylet starts, would else see its end only some seconds later.
    """
    node: Any = worker._global_node
    worker._global_node = None
    started = [process for _, process in node.live_processes()]
    theirs = [child for process in started for child in _children(process.pid)]
    ray.shutdown()
    node.destroy_external_storage()
    node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
    for child in theirs:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()  # looks first whether it still is that process


def _children(pid: int) -> list[Any]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return list(psutil.Process(pid).children(recursive=True))
    return []


@contextlib.contextmanager
def no_sigterm_handler() -> Iterator[None]:
    """Keep ``ray.init`` from setting a handler for SIGTERM, which would exit with status 15 and save nothing."""
    before = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = before


def short_temp_dir(other: str = "/tmp/ray") -> str | None:
    """Where Ray's usual temporary folder is too long for sockets in it, ``other``; else None, for the usual one.

    Raises:
        OSError: neither will do.
    """
    usual = get_default_ray_temp_dir()  # type: ignore[no-untyped-call]  # as is much of Ray
    if _holds_socket(usual, SESSION):
        return None
    if not _holds_socket(other, SESSION):
        raise OSError(f"{other} is too long as well")
    Path(other).mkdir(parents=True, exist_ok=True)
    if not os.access(other, os.W_OK | os.X_OK):
        raise OSError(f"{other} is somebody else's")
    return other


@contextlib.contextmanager
def short_tmpdir(other: str = "/tmp") -> Iterator[None]:
    """Let processes that are started meanwhile have ``other`` for a TMPDIR that is too long for sockets in it.

    Ray's dashboard has subprocesses, and with them Python's own sockets, which Ray waits for in vain for a minute.
    """
    before = os.environ.get("TMPDIR")
    if before is None or _holds_socket(before, LISTENER):
        yield
        return
    os.environ["TMPDIR"] = other
    try:
        yield
    finally:
        os.environ["TMPDIR"] = before


def _holds_socket(folder: str, name: str) -> bool:
    try:
        utils.validate_socket_filepath(os.path.join(folder, name))
    except OSError:
        return False
    return True


def draining_nodes() -> Mapping[str, int]:
    """Ids of nodes that are about to be taken away, with the time of it in ms since 1970."""
    found: Mapping[str, int] = state.state.get_draining_nodes()
    return found


def node_of(actor: Any) -> str:
    """Id of the node that an actor was placed on, dead or alive; "" where Ray does not know of one."""
    found: Mapping[str, Any] = state.state.actor_table(actor._actor_id.hex())
    return str(found.get("Address", {}).get("NodeID", ""))


def free_resources() -> Mapping[str, Mapping[str, float]]:
    """Resources of each node by its id that nobody has reserved."""
    found: Mapping[str, Mapping[str, float]] = state.available_resources_per_node()  # type: ignore[no-untyped-call]
    return found


# Packages


def give_back_placement_groups() -> int:
    """Remove the placement groups that this driver's job has left on the cluster; returns how many.

    Ray removes one when its job ends. Ray Train's own cleaner of a controller that was killed asks the dashboard, which
    need not run, and until then the room of the dead training is nobody's.
    """
    job = ray.get_runtime_context().get_job_id()
    left = [
        PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name)))
        for name, entry in placement_group_table().items()
        if name.endswith(job) and entry["state"] != "REMOVED"  # the id of a group ends in that of its job
    ]
    for group in left:
        remove_placement_group(group)
    return len(left)


def walk_package(folder: Path, excludes: Sequence[str], visit: Callable[[Path], None]) -> None:
    """Visit what Ray would send of ``folder`` with a job.

    The walk is Ray's own: any other would in the end disagree with what is sent.
    """
    excluded = [packaging._get_excludes(folder, [*get_runtime_env_default_excludes(), *excludes])]
    with_gitignore = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    packaging._dir_travel(folder, excluded, visit, include_gitignore=with_gitignore)
