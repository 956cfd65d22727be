"""The files of cluster/, with the placeholders filled."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]
CLUSTER = REPOSITORY / "cluster"
YAML_FILES = sorted(path.name for path in CLUSTER.glob("*.yaml"))
PLACEHOLDER = re.compile(r"\$\{\w+\}")


def filled(text: str) -> str:
    return PLACEHOLDER.sub(lambda match: match[0][2:-1].lower().replace("_", "-"), text)


def load(name: str, change: Callable[[str], str] = str) -> dict[str, Any]:
    """The file as Ray's loader reads it, after ``change`` of its text."""
    data: dict[str, Any] = yaml.safe_load(change(filled((CLUSTER / name).read_text())))
    return data


def items(name: str, change: Callable[[str], str] = str) -> list[dict[str, Any]]:
    """The objects in a Kubernetes list."""
    data = load(name, change)
    assert (data["apiVersion"], data["kind"]) == ("v1", "List")
    return list(data["items"])


def constrained(package: str) -> str:
    """The version that constraints.txt pins."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{package}=="))
