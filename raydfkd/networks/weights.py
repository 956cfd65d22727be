"""Weights of networks: read from any URL, written as safetensors; nothing is unpickled but tensors."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping

import fsspec
import safetensors.torch
import torch
from torch import Tensor, nn

from raydfkd.config.schema import is_file
from raydfkd.errors import MissingError, RecipeError, one_line
from raydfkd.networks.state_files import NO_WEIGHTS, Match, match_state, read_states, shards_of
from raydfkd.report.redaction import redacted, secrets_in, secrets_of_environment

logger = logging.getLogger(__name__)


def weights_exist(uri: str, *, where: str) -> bool:
    """Whether there is a file at ``uri``.

    Raises:
        RecipeError: nobody can say: its file system does not answer (MissingError), or there is no such kind.
    """
    if not is_file(uri):
        return True
    try:
        filesystem, path = fsspec.url_to_fs(uri)
        if filesystem.exists(path):
            return True
        if uri.startswith(("http://", "https://")):  # whose every failure reads as a missing file
            filesystem.cat_file(path, start=0, end=1)
    except FileNotFoundError:
        return False
    except Exception as error:  # every file system has errors of its own; here they become the user's line
        raise _unreadable(uri, error, where) from None
    return False


def load_weights(network: nn.Module, uri: str, *, where: str, say: Callable[[str], None] = logger.info) -> str:
    """Load a state dict into ``network``; return the SHA-256 of the file. Nothing is ever unpickled but tensors.

    A checkpoint that holds the state dict among other things, or under the names of a wrapper, is taken for what is
    meant, and ``say`` is told so, in one line. A network that comes with its weights is left as it is.

    Raises:
        RecipeError: no such file, not weights, weights of another network, or numbers that are not finite.
    """
    if not is_file(uri):
        _refuse_not_finite(network, uri, where)
        return hashlib.sha256(save_bytes(network)).hexdigest()
    what = f"{where} is {uri!r}"
    content = read_weights(uri, where=where)
    digest = hashlib.sha256(content)
    states = read_states(content, what)
    if shards := shards_of(content, what):
        states = {"": {}}
        for shard in shards:
            part = read_weights(f"{uri.rpartition('/')[0] or '.'}/{shard}", where=where)
            digest.update(part)
            for state in read_states(part, f"{what}, file {shard}").values():
                states[""] = {**states[""], **state}
    match = match_state(states, network, what)
    _load(network, match, uri, where)
    _refuse_not_finite(network, uri, where)
    if match.notice:
        say(f"{where}: {match.notice}")
    return digest.hexdigest()


def read_weights(uri: str, *, where: str) -> bytes:
    """The bytes of the file at ``uri``.

    Raises:
        RecipeError: there is none, or it cannot be read.
    """
    try:
        filesystem, path = fsspec.url_to_fs(uri)
        content: bytes = filesystem.cat_file(path)
    except IsADirectoryError:
        raise RecipeError(
            f"{where} is {uri!r}: a folder; give a file in it, such as model.safetensors or "
            "model.safetensors.index.json, or the folder of a transformers model as teacher.network: hf:FOLDER"
        ) from None
    except (FileNotFoundError, NotADirectoryError):
        raise RecipeError(
            f"{where} is {uri!r}: no such file; give trained weights, or teacher.train to train them"
        ) from None
    except Exception as error:  # every file system has errors of its own; here they become the user's line
        raise _unreadable(uri, error, where) from None
    return content


def _unreadable(uri: str, error: Exception, where: str) -> RecipeError:
    protocol, separator, _ = uri.partition("://")
    reason = redacted(one_line(error), {*secrets_in(uri), *secrets_of_environment()})
    is_cloud = separator and protocol not in ("file", "http", "https")
    is_out_of_reach = not isinstance(error, ValueError)  # which is that of an unknown protocol
    hint = (
        "; transfer_set.storage_options do not count here: credentials and endpoint come from the environment "
        "(for s3 AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)"
        if is_cloud and is_out_of_reach
        else ""
    )
    refusal = MissingError if is_out_of_reach else RecipeError
    return refusal(f"{where} is {uri!r}: cannot be read ({reason}){hint}; give a file that this machine can read")


def _load(network: nn.Module, match: Match, uri: str, where: str) -> None:
    """Load what was matched, or leave ``network`` as it was; torch decides what must be there."""
    before = {key: value.clone() for key, value in network.state_dict().items()}
    try:
        missing, unexpected = network.load_state_dict(dict(match.state), strict=False)
    except (RuntimeError, ValueError, KeyError) as error:
        problem = match.problem or one_line(error)
    else:
        missing = [key for key in missing if not key.endswith(NO_WEIGHTS) and not _is_shared(key, network, match.state)]
        if not missing and not unexpected:
            return
        problem = match.problem or (f"{missing[0]} is missing" if missing else f"{unexpected[0]} is not in the network")
    network.load_state_dict(before)
    raise RecipeError(f"{where} is {uri!r}: weights of another network ({problem}); check network and options")


def _is_shared(key: str, network: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Whether the tensor ``key`` has come under another name that it goes by, as files without copies have it."""
    own = network.state_dict()
    return any(other != key and own[other].data_ptr() == own[key].data_ptr() for other in state if other in own)


def _refuse_not_finite(network: nn.Module, uri: str, where: str) -> None:
    """Refuse NaN anywhere, and infinity in weights and statistics; masks may be infinite."""
    weights = {name for name, _ in network.named_parameters()}
    for key, value in network.state_dict().items():
        if not value.is_floating_point():
            continue
        is_mask = key not in weights and not key.endswith(("running_mean", "running_var"))
        if bool(value.isnan().any()) or (not is_mask and not bool(value.isfinite().all())):
            count = int((~value.isfinite()).sum())
            raise RecipeError(
                f"{where} is {uri!r}: {count} of the {value.numel()} values of {key} are not finite; "
                "give weights of a training that went well"
            )


def save_bytes(network: nn.Module, metadata: Mapping[str, str] | None = None) -> bytes:
    """The network's state dict as a safetensors file."""
    return state_bytes(network.state_dict(), metadata or {})


def state_bytes(state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A state dict as a safetensors file; a tensor with two names is in it twice, since a shared one has no place."""
    plain = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    return safetensors.torch.save(plain, None if metadata is None else dict(metadata))
