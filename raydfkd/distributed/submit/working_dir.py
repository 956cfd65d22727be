"""The files of a folder that are sent along with a job, as Ray itself chooses them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raydfkd.distributed.ray_internals import walk_package
from raydfkd.errors import RecipeError

CREDENTIALS = (
    *(".env", ".env.*", "*.env", ".netrc", ".aws", ".azure", "**/.config/gcloud", ".ssh", ".kube", ".docker", ".ray"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", ".boto", ".s3cfg"),
    *("*[Cc]redential*", "*[Ss]ervice[-_][Aa]ccount*.json", "*[Tt]oken.json", "auth_token", ".git-credentials"),
)
"""Files and folders that may hold credentials: never sent, for whoever may enter a cluster can read what is."""
UNWANTED = ("/runs", "/build", "/dist", "*.egg-info", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis")
"""Nothing that a job needs."""
EXCLUDES = (*UNWANTED, *CREDENTIALS)
"""Never sent, in the manner of .gitignore, beside what that names and Ray's own .git, .venv, __pycache__."""
MOST_BYTES = 100 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """The files of a folder that are sent."""

    files: frozenset[str]
    """Paths relative to the folder."""
    num_bytes: int
    """Of all files together; Ray does not compress them."""
    largest: tuple[str, int]
    """The entry at the top of the folder that weighs most, and its bytes."""
    withheld: tuple[str, ...]
    """Files that are not sent because they may hold credentials, sorted."""


def package_of(folder: Path) -> Package:
    """The files that Ray would send of ``folder``; reads no file but .gitignore and .rayignore."""
    sizes = _sizes(folder, EXCLUDES)
    entries: Counter[str] = Counter()
    for name, size in sizes.items():
        entries[name.partition("/")[0]] += size
    (largest,) = entries.most_common(1) or [("", 0)]
    return Package(
        files=frozenset(sizes),
        num_bytes=sum(sizes.values()),
        largest=largest,
        withheld=tuple(sorted(_sizes(folder, UNWANTED).keys() - sizes.keys())),
    )


def _sizes(folder: Path, excludes: Sequence[str]) -> dict[str, int]:
    """Bytes of each file that Ray would send if it left out ``excludes``."""
    sizes: dict[str, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            sizes[str(path.relative_to(top))] = path.stat().st_size

    top = folder.absolute()
    walk_package(top, excludes, note)
    return sizes


def check_package(package: Package, folder: Path, needs: Sequence[str]) -> None:
    """Refuse a package that is too large to send or lacks a file in ``needs``, or all files of a folder there.

    Raises:
        RecipeError: with the remedy.
    """
    if package.num_bytes > MOST_BYTES:
        name, size = package.largest
        raise RecipeError(
            f"--working-dir {folder} holds {in_mib(package.num_bytes)}, {in_mib(size)} of it in {name}; at most "
            f"{in_mib(MOST_BYTES)} are sent with a job: name what it does not need in .gitignore or .rayignore"
        )
    for name in needs:
        if name in package.withheld:
            raise RecipeError(
                f"{name} is not sent with the job: it is called as files with credentials are; rename it, or give a "
                "URL or a path that every node sees"
            )
        if name not in package.files and not any(sent.startswith(f"{name}/") for sent in package.files):
            raise RecipeError(
                f"{name} is not sent with the job: it is not in --working-dir {folder}, or .gitignore leaves it out; "
                "put it there, or give a URL or a path that every node sees"
            )


def in_mib(num_bytes: int) -> str:
    """``3565158`` as ``3.4 MiB``."""
    return f"{num_bytes / 2**20:.1f} MiB"
