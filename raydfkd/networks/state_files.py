"""Files of weights as people have them: the state dict in a file, and its names as the network has them."""

from __future__ import annotations

import argparse
import collections
import io
import pathlib
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from raydfkd.errors import RecipeError, one_line

State = Mapping[str, Tensor]
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of names that wrappers for parallelism, compilation and checkpointing put in, anywhere."""
NO_WEIGHTS = ("num_batches_tracked", "n_averaged", "total_ops", "total_params", "position_ids")
"""Last parts of names of what a network computes the same without: counters and constants."""
_REMEDY = "give a .safetensors file or torch.save(net.state_dict())"
_BESIDE_WEIGHTS: list[Any] = [
    *(argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath, collections.defaultdict, dict, list),
    *(np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in "?bBhHiIlLefd")),
    (np.asarray(0.0)[()].__reduce__()[0], "numpy.core.multiarray.scalar"),
    np.asarray(0.0)[()].__reduce__()[0],
    (np.zeros(1).__reduce__()[0], "numpy.core.multiarray._reconstruct"),
    np.zeros(1).__reduce__()[0],
]
"""Plain data that lies beside weights in checkpoints; none of it runs code when it is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A state dict in the names of a network."""

    state: State
    notice: str
    """What was done for it, in one line; empty where that is nothing."""
    problem: str
    """The first thing that does not fit, if there is one."""


def read_states(content: bytes, what: str) -> dict[str, State]:
    """Every state dict in a file, by the keys that lead to it; "" for a file that is one.

    The format is told by the content. ``what`` begins every message.

    Raises:
        RecipeError: it is something else, by what it is.
    """
    kind = _kind_of(content)
    if kind:
        raise RecipeError(f"{what}: {kind}, not a state dict of tensors; {_REMEDY}")
    try:
        found = _parse(content)
    except Exception as error:  # any parser's complaint means the same to the user
        known = re.search(r"GLOBAL (\S+)|Unsupported (?:class|global): *(?:GLOBAL )?(\S+)", one_line(error))
        holds = f" (it holds a pickled {known[1] or known[2]}, and code is never run)" if known else ""
        raise RecipeError(f"{what}: not a state dict of tensors{holds}; {_REMEDY}") from None
    states = dict(_states_in(found, ()))
    if not states:
        keys = f" (its keys: {', '.join(map(str, list(found)[:5]))})" if isinstance(found, Mapping) and found else ""
        raise RecipeError(f"{what}: not a state dict of tensors{keys}; {_REMEDY}")
    return states


def _kind_of(content: bytes) -> str:
    """What a file is that is surely no weights; empty where it may be."""
    start = content[:256].lstrip()
    if start.startswith(b"<"):
        return "a web page, perhaps one that asks to sign in"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, whose file is still to be fetched (git lfs pull)"
    if zipfile.is_zipfile(io.BytesIO(content)):
        names = zipfile.ZipFile(io.BytesIO(content)).namelist()
        if any("/code/" in name or name.endswith("constants.pkl") for name in names):
            return "a TorchScript file"
        if any("exported_program" in name or name.endswith("archive_format") for name in names):
            return "an exported program"
    return ""


def _parse(content: bytes) -> Any:
    (length,) = struct.unpack("<Q", content[:8].ljust(8, b"\0"))
    if content[8:9] == b"{" and 0 < length <= len(content):
        return safetensors.torch.load(content)
    with torch.serialization.safe_globals(_BESIDE_WEIGHTS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about the file, which mean nothing to the user
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _states_in(found: Any, path: tuple[str, ...]) -> Iterator[tuple[str, State]]:
    if not isinstance(found, Mapping):
        return
    tensors = {key: torch.from_numpy(value) if _is_numbers(value) else value for key, value in found.items()}
    tensors = {key: value for key, value in tensors.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield ".".join(path), tensors
    for key, value in found.items():
        yield from _states_in(value, (*path, str(key)))


def _is_numbers(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.dtype.isnative


def match_state(states: Mapping[str, State], network: nn.Module, what: str) -> Match:
    """The state dict of a file that fits ``network``, in its names; the likeliest with its problem where none does.

    Raises:
        RecipeError: several fit.
    """
    own = network.state_dict()
    matches = {key: _renamed(state, own) for key, state in states.items()}
    fitting = {key: match for key, match in matches.items() if not match.problem}
    if len(fitting) > 1:
        raise RecipeError(
            f"{what}: several of its entries fit the network ({', '.join(key or 'its top' for key in fitting)}); "
            "save the one that is meant in a file of its own"
        )
    key = next(iter(fitting)) if fitting else max(states, key=lambda key: len(states[key]))
    match = matches[key]
    notices = [f"the weights are its entry {key!r}"] if key else []
    return Match(
        state=match.state,
        problem=match.problem,
        notice="; ".join([*notices, match.notice] if match.notice else notices),
    )


def _renamed(state: State, own: State) -> Match:
    """``state`` in the names of ``own``: as it is, without parts of wrappers, or without what all names begin with."""
    as_is = Match(state=_without_counters(state, own), notice="", problem=_problem(state, own))
    if not as_is.problem:
        return as_is
    ours = {_without_wrappers(key): key for key in own}
    theirs = {_without_wrappers(key): value for key, value in state.items()}
    if len(ours) < len(own) or len(theirs) < len(state):
        return as_is
    weights = [key for key in theirs if not key.endswith(NO_WEIGHTS)]
    for depth in range(_common_depth(weights) + 1):
        cut = {".".join(key.split(".")[depth:]): value for key, value in theirs.items()}
        renamed = {ours[key]: value for key, value in cut.items() if key in ours}
        left_out = [key for key in cut if key not in ours and not key.endswith(NO_WEIGHTS)]
        if not left_out and not _problem(renamed, own):
            return Match(state=renamed, notice=_notice(state, depth, weights), problem="")
    return as_is


def _notice(state: State, depth: int, weights: list[str]) -> str:
    cut = ".".join(weights[0].split(".")[:depth])
    parts = sorted({part for key in state for part in key.split(".") if part in WRAPPERS} | ({cut} if cut else set()))
    return f"names are taken without {', '.join(f'{part}.' for part in parts)}" if parts else ""


def _without_wrappers(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def _common_depth(keys: list[str]) -> int:
    """How many parts all ``keys`` begin with, the last part of each left out."""
    parts = [key.split(".")[:-1] for key in keys]
    depth = 0
    for together in zip(*parts, strict=False):
        if len(set(together)) > 1:
            break
        depth += 1
    return depth


def _without_counters(state: State, own: State) -> State:
    return {key: value for key, value in state.items() if key in own or not key.endswith(NO_WEIGHTS)}


def _problem(state: State, own: State) -> str:
    """The first thing in which ``state`` is not that of a network with ``own``; empty where it fits."""
    shared = {value.data_ptr() for key, value in own.items() if key in state and value.numel()}
    missing = sorted(
        key for key in own.keys() - state.keys() if not key.endswith(NO_WEIGHTS) and own[key].data_ptr() not in shared
    )
    unexpected = sorted(key for key in state.keys() - own.keys() if not key.endswith(NO_WEIGHTS))
    reshaped = sorted(
        key
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape and not (own[key].ndim == 0 and state[key].numel() == 1)
    )
    if missing:
        return f"{missing[0]} is missing"
    if unexpected:
        return f"{unexpected[0]} is not in the network"
    if reshaped:
        return f"{reshaped[0]} is {list(state[reshaped[0]].shape)}, the network's {list(own[reshaped[0]].shape)}"
    return ""
