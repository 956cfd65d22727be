"""Networks of other libraries and archives by name, and what these know of them: image space, classes, weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from raydfkd.config.load import expand_home
from raydfkd.config.schema import is_own
from raydfkd.errors import MissingError, RecipeError, one_line
from raydfkd.networks.hubs import Archive, Description, Library, Timm, TorchHub, Torchvision, Transformers
from raydfkd.networks.packaged import Packaged

LIBRARIES: Mapping[str, Library] = {
    "torchvision": Torchvision(),
    "timm": Timm(),
    "pypi": Packaged(),
    "hf": Transformers(),
    "torchhub": TorchHub(),
    "torchscript": Archive("torchscript", lambda path: torch.jit.load(path, map_location="cpu")),
    "export": Archive("export", lambda path: torch.export.load(path).module()),
}
"""Families of networks by the name before the colon."""


def needs_permission(family: str, name: str) -> bool:
    """Whether building such a network runs code that came with it and that nobody has imported knowingly."""
    if family == "torchhub":
        return not Path(expand_home(name.rpartition(":")[0])).is_dir()
    return family in ("torchscript", "export")


def library_of(network: str, where: str) -> tuple[Library, str] | None:
    """The library that has a network and the network's name there; None for those that are not of a library.

    Raises:
        RecipeError: it has none of that name.
        MissingError: it is not installed, or the network's file or folder is not there.
    """
    family, colon, name = network.partition(":")
    if not colon or family not in LIBRARIES:
        return None
    LIBRARIES[family].check(name, where)
    return LIBRARIES[family], name


def described(section: Mapping[str, Any], where: str = "teacher") -> Description:
    """What the library of a network knows of it; empty for one that is of no library.

    ``weights`` is in it as well: the network's own ones unless others are given.

    Args:
        section: of a recipe, on a trained network; it may lack much.
        where: the section's key.

    Raises:
        RecipeError: it has none of that name.
        MissingError: it is not installed, or cannot be reached.
    """
    network, options = section.get("network"), section.get("options") or {}
    found = library_of(network, where) if isinstance(network, str) else None
    if found is None or not isinstance(options, Mapping):
        return {}
    library, name = found
    weights = section.get("weights", "pretrained" if section.get("train") is None else None)
    own = weights if isinstance(weights, str) and is_own(weights) else ""
    with _one_line(f"{where}.network is {network!r}, whose description cannot be read", hub_hint(str(network))):
        description = library.describe(name, options, own=own)
    return {**description, **({"weights": own} if own else {})}


@contextlib.contextmanager
def _one_line(what: str, hint: str) -> Iterator[None]:
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:  # a library may raise anything
        refuse = MissingError if isinstance(error, OSError) else RecipeError
        raise refuse(f"{what}: {one_line(error)}{hint}") from error


def hub_hint(network: str) -> str:
    """What to do where a hub is out of reach."""
    family = network.partition(":")[0]
    remedies = {
        "hf": "; offline give hf:FOLDER, what save_pretrained writes",
        "timm": "; offline give teacher.weights as a file, or timm:local-dir:FOLDER",
        "torchvision": "; offline give teacher.weights as a file",
        "torchhub": "; offline give torchhub:FOLDER:NAME, a clone of the repository",
    }
    return remedies.get(family, "")
