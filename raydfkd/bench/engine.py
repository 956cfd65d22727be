"""Names of the engine and the device that were measured: a figure without them says nothing a month later."""

from __future__ import annotations

import hashlib
import importlib.metadata
from functools import cache
from pathlib import Path

import raydfkd
from raydfkd.devices import device_name, pick_device


@cache
def code_digest(*parts: str) -> str:
    """Eight hexadecimal digits of the SHA-256 of the package's version and Python files; no commit is needed for it.

    Of the folders and files ``parts`` alone, where there are some.
    """
    found = hashlib.sha256(raydfkd.__version__.encode())
    folder = Path(raydfkd.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        if parts and not any(folder / part in (path, *path.parents) for part in parts):
            continue
        found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:8]


def engine() -> dict[str, str]:
    """Versions of the software that computes: ``raydfkd`` with its code's digest, as 0.1.0+3f2a9c1b, and ``torch``."""
    return {"raydfkd": f"{raydfkd.__version__}+{code_digest()}", "torch": importlib.metadata.version("torch")}


def measured_with(device: str) -> str:
    """A line above a table: versions, and what ``device`` (auto, cpu or cuda) is here.

    Raises:
        RecipeError: there is no such device.
    """
    versions = ", ".join(f"{package} {version}" for package, version in engine().items())
    return f"{versions}, {device_name(pick_device(device))}"
