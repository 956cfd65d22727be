"""Provenance of a report: the versions that ran and the command that started them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import shlex
import sys
from pathlib import Path

from raydfkd import __version__
from raydfkd.report.redaction import redacted_setting


def versions() -> dict[str, str]:
    """Versions of the software that ran."""
    found = {"raydfkd": __version__, "python": platform.python_version()}
    for package in ("torch", "torchvision", "ray", "pyarrow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def command_line() -> str:
    """The command that started this process, without secrets."""
    return shlex.join([Path(sys.argv[0]).name, *map(redacted_setting, sys.argv[1:])])
