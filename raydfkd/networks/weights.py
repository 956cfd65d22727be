"""Weights of networks: read from any URL, written as safetensors; nothing is unpickled but tensors."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping

import fsspec
import safetensors.torch
import torch
from torch import Tensor, nn

from raydfkd.errors import RecipeError


def weights_exist(uri: str, *, where: str) -> bool:
    """Whether there is a file at ``uri``.

    Raises:
        RecipeError: nobody can say, because its file system does not answer.
    """
    if uri == "random":
        return True
    try:
        filesystem, path = fsspec.url_to_fs(uri)
        return bool(filesystem.exists(path))
    except Exception as error:  # every file system has errors of its own; here they become the user's line
        raise _unreadable(uri, error, where) from None


def load_weights(network: nn.Module, uri: str, *, where: str) -> str:
    """Load a state dict into ``network``; return the SHA-256 of the file. Nothing is ever unpickled but tensors.

    Raises:
        RecipeError: no such file, not weights, or weights of another network.
    """
    if uri == "random":
        return hashlib.sha256(save_bytes(network)).hexdigest()
    try:
        with fsspec.open(uri, "rb") as file:
            content: bytes = file.read()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise RecipeError(
            f"{where} is {uri!r}: no such file; give trained weights, or teacher.train to train them"
        ) from None
    except Exception as error:  # every file system has errors of its own; here they become the user's line
        raise _unreadable(uri, error, where) from None
    state = _parse_weights(content, uri, where)
    own = network.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if missing or unexpected or reshaped:
        problem = (
            f"{missing[0]} is missing" if missing else
            f"{unexpected[0]} is not in the network" if unexpected else
            f"{min(reshaped)} is {list(state[min(reshaped)].shape)}, the network's {list(own[min(reshaped)].shape)}"
        )  # fmt: skip
        raise RecipeError(f"{where} is {uri!r}: weights of another network ({problem}); check network and options")
    network.load_state_dict(dict(state))
    return hashlib.sha256(content).hexdigest()


def _unreadable(uri: str, error: Exception, where: str) -> RecipeError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return RecipeError(f"{where} is {uri!r}: cannot be read ({reason}); give a file that this machine can read")


def _parse_weights(content: bytes, uri: str, where: str) -> Mapping[str, Tensor]:
    refusal = RecipeError(
        f"{where} is {uri!r}: not a state dict of tensors; give a .safetensors file or torch.save(net.state_dict())"
    )
    try:
        if uri.endswith(".safetensors"):
            return safetensors.torch.load(content)
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # any parser's complaint means the same to the user
        raise refusal from None
    if not isinstance(state, dict):
        raise refusal
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise refusal
    return state


def save_bytes(network: nn.Module, metadata: Mapping[str, str] | None = None) -> bytes:
    """The network's state dict as a safetensors file."""
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    return safetensors.torch.save(state, dict(metadata or {}))
