"""Files of weights as people have them: the state dict in a file, and its names as the network has them."""

from __future__ import annotations

import argparse
import collections
import io
import itertools
import json
import pathlib
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from raydfkd.errors import RecipeError, one_line

State = Mapping[str, Tensor]
MAX_DEPTH = 4
"""Parts of a name at whose end a network within a training's file is looked for."""
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of names that wrappers for parallelism, compilation and checkpointing put in, anywhere."""
NO_WEIGHTS = ("num_batches_tracked", "n_averaged", "total_ops", "total_params", "position_ids")
"""Last parts of names of what a network computes the same without: counters and constants."""
_REMEDY = "give a .safetensors file or torch.save(net.state_dict())"
_TORCHSCRIPT, _EXPORTED = "a TorchScript file, which is code", "an exported program, which is code"
_REMEDIES = {
    _TORCHSCRIPT: "give network: torchscript:FILE and allow_code: true, or torch.save(net.state_dict())",
    _EXPORTED: "give network: export:FILE and allow_code: true, or torch.save(net.state_dict())",
}
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

    The format is told by the content. ``what`` begins every message. The index of a sharded state dict has none.

    Raises:
        RecipeError: it is something else, by what it is.
    """
    if _index_in(content) is not None:
        return {}
    kind = _kind_of(content)
    if kind:
        raise RecipeError(f"{what}: {kind}, not a state dict of tensors; {_REMEDIES.get(kind, _REMEDY)}")
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


def shards_of(content: bytes, what: str) -> list[str]:
    """Names of the files beside an index that hold the tensors of a sharded state dict; none where it is no index.

    Raises:
        RecipeError: it names files elsewhere.
    """
    shards = sorted(set((_index_in(content) or {}).values()))
    for shard in shards:
        if "/" in shard or shard.startswith("."):
            raise RecipeError(f"{what}: an index that names {shard!r}; its files must lie beside it")
    return shards


def _index_in(content: bytes) -> dict[str, str] | None:
    """Names of tensors and of their files, if ``content`` is the index of a sharded state dict."""
    if not content[:64].lstrip().startswith(b"{"):
        return None
    try:
        files = json.loads(content)["weight_map"]
        return {str(key): str(file) for key, file in files.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


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
            return _TORCHSCRIPT
        if any("exported_program" in name or name.endswith("archive_format") for name in names):
            return _EXPORTED
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
    averaged = [key for key in fitting if re.search(r"(^|[._])ema([._]|$)|averaged|shadow", key.lower())]
    if len(fitting) > 1 and len(averaged) == 1:
        fitting = {averaged[0]: fitting[averaged[0]]}
    if len(fitting) > 1:
        raise RecipeError(
            f"{what}: several of its entries fit the network ({', '.join(key or 'its top' for key in fitting)}); "
            "save the one that is meant in a file of its own"
        )
    key = next(iter(fitting)) if fitting else max(states, key=lambda key: _overlap(states[key], own))
    match = matches[key]
    notices = [f"the weights are its entry {key!r}"] if key else []
    return Match(
        state=match.state,
        problem=match.problem,
        notice="; ".join([*notices, match.notice] if match.notice else notices),
    )


def _overlap(state: State, own: State) -> tuple[int, int]:
    return sum(key in own for key in state), len(state)


def _renamed(state: State, own: State) -> Match:
    """``state`` in the names of ``own``: as it is, without parts of wrappers, or with what all names begin with cut.

    Where only names that begin alike fit, as in a file of a whole training, they are taken and the rest is left out.
    """
    as_is = Match(state=_without_counters(state, own), notice="", problem=_problem(state, own))
    if not as_is.problem:
        return as_is
    ours = {_without_wrappers(key): key for key in own}
    theirs = {_without_wrappers(key): value for key, value in state.items()}
    if len(ours) < len(own) or len(theirs) < len(state):
        return as_is
    begins = [".".join(_weights(ours)[0].split(".")[:depth]) for depth in range(_common_depth(_weights(ours)) + 1)]
    closest = as_is
    whole: dict[str, Match] = {}
    parts: dict[str, Match] = {}
    for begin, cut in itertools.product(begins, _beginnings(theirs)):
        part = {key.removeprefix(f"{cut}.") if cut else key: value for key, value in theirs.items() if _in(key, cut)}
        named = {f"{begin}.{key}" if begin else key: value for key, value in part.items()}
        renamed = _without_counters({ours.get(key, key): value for key, value in named.items()}, own)
        if _fitting(renamed, own) < _fitting(closest.state, own) or not renamed:
            continue
        problem = _problem(renamed, own)
        others = _weights(key for key in theirs if not _in(key, cut))
        closest = Match(state=renamed, notice=_notice(state, begin, cut, others), problem=problem)
        if not problem:
            found = parts if others else whole
            found[cut] = closest
    if len(parts) > 1 and not whole:
        several = ", ".join(f"{cut}." for cut in parts)
        return replace(as_is, problem=f"it has several parts that fit: {several}")
    return next(iter([*whole.values(), *parts.values(), closest]))


def _weights(names: Iterable[str]) -> list[str]:
    return [key for key in names if not key.endswith(NO_WEIGHTS)]


def _beginnings(names: Iterable[str]) -> list[str]:
    """Everything up to a dot that a name begins with, the shortest first: at first nothing."""
    parts = [key.split(".")[:-1] for key in _weights(names)]
    begins = {".".join(part[:depth]) for part in parts for depth in range(min(len(part), MAX_DEPTH) + 1)}
    return sorted(begins, key=lambda begin: (begin.count(".") + bool(begin), begin))


def _in(key: str, begin: str) -> bool:
    return not begin or key.startswith(f"{begin}.")


def _notice(state: State, begin: str, cut: str, others: list[str]) -> str:
    parts = sorted({part for key in state for part in key.split(".") if part in WRAPPERS} | ({cut} if cut else set()))
    said = [f"names are taken without {', '.join(f'{part}.' for part in parts)}"] if parts else []
    said += [f"names are taken with {begin}. before them"] if begin else []
    said += [f"{len(others)} other tensors are left out ({others[0]}, ...)"] if others else []
    return "; ".join(said)


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
    problem = _first_problem(state, own)
    if not problem:
        return ""
    return f"{problem}; {_fitting(state, own)} of the network's {len(_weights(own))} tensors fit"


def _fitting(state: State, own: State) -> int:
    """Number of the network's tensors that ``state`` has, of their shapes."""
    return sum(key in state and state[key].shape == own[key].shape for key in _weights(own))


def _first_problem(state: State, own: State) -> str:
    shared = {value.data_ptr() for key, value in own.items() if key in state and value.numel()}
    missing = [
        key for key in own if key not in state and not key.endswith(NO_WEIGHTS) and own[key].data_ptr() not in shared
    ]
    unexpected = [key for key in state if key not in own and not key.endswith(NO_WEIGHTS)]
    reshaped = [
        key
        for key in own
        if key in state and own[key].shape != state[key].shape and not (own[key].ndim == 0 and state[key].numel() == 1)
    ]
    if reshaped:
        return f"{reshaped[0]} is {list(state[reshaped[0]].shape)}, the network's {list(own[reshaped[0]].shape)}"
    if missing and unexpected:
        return f"{missing[0]} is missing, and {unexpected[0]} is not in the network"
    if missing:
        return f"{missing[0]} is missing"
    if unexpected:
        return f"{unexpected[0]} is not in the network"
    return ""
