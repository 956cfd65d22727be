"""Whether the machine of a worker is still there, which Ray itself notices only some time later."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

import ray

ANSWER_S = 2.0
"""Seconds within which a machine that is there takes a connection."""


def is_there(node_id: str) -> bool:
    """Whether the node of that id runs and takes connections; "" is no node's."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]  # Ray has no stub for it
    return any(node["NodeID"] == node_id and node["Alive"] and takes_connections(node) for node in nodes)


def takes_connections(node: Mapping[str, Any]) -> bool:
    """Whether the Ray process of a node takes connections; that of a killed one refuses them, or nothing comes back."""
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=ANSWER_S):
            return True
    except OSError:
        return False
