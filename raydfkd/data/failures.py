"""How storage fails: what passes by itself and is tried again, and what is said, in one line, of the rest."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    wait_random_exponential,
)

T = TypeVar("T")

PUBLIC_OPTIONS = frozenset({"endpoint_url", "client_kwargs.endpoint_url", "client_kwargs.region_name", "profile"})
"""Storage options that an error may show, because it is of no use without them."""

_ATTEMPTS = 8
_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 20.0
_PATIENCE_S = 60.0

_PASSING_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_PASSING_CODES = frozenset(
    {
        "BandwidthLimitExceeded",
        "ConditionalRequestConflict",
        "InternalError",
        "OperationAborted",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "ThrottledException",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "TooManyRequestsException",
    }
)
_PASSING_ERRNO = frozenset(
    getattr(errno, name)
    for name in ("EAGAIN", "EBUSY", "ECONNRESET", "EHOSTUNREACH", "ENETUNREACH", "EREMOTEIO", "ETIMEDOUT")
    if hasattr(errno, name)
)
# by name, because none of these packages is imported unless a URI needs it
_PASSING_CLASSES = frozenset(
    {
        "aiohttp.ClientConnectionError",
        "aiohttp.ClientPayloadError",
        "botocore.ConnectionError",
        "botocore.HTTPClientError",
        "requests.ChunkedEncodingError",
        "requests.ConnectionError",
        "requests.Timeout",
        "urllib3.IncompleteRead",
    }
)
_LASTING_CLASSES = frozenset({"aiohttp.ClientSSLError", "botocore.SSLError", "requests.SSLError"})
_LASTING = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_SECRET_VARIABLE = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|PRIVATE|(ACCESS|API|ACCOUNT|STORAGE)_KEY")


class StoreError(OSError):
    """A store cannot do what was asked, and trying again did not help; one line that shows no secret."""


class OutageError(StoreError):
    """A store did not answer, or with errors that pass, for as long as it was asked again: about a minute."""


class DamagedError(ValueError):
    """What a set has stored is not what was committed; one line that names the object.

    Args:
        uri: of the set, without any password in it.
        path: of the damaged object, relative to the set.
        reason: what is wrong with it; goes on from its name.
    """

    def __init__(self, uri: str, path: str, reason: str) -> None:
        super().__init__(uri, path, reason)
        self.path = path
        self.reason = reason
        self._uri = uri

    def __str__(self) -> str:
        return f"{self._uri}/{self.path} {self.reason}"


def is_transient(error: BaseException) -> bool:
    """Whether a file system's error is one that passes: throttling, 5xx, a time-out, a connection that was lost.

    What a server answered decides if there is an answer in the chain of causes; credentials, permissions, missing
    objects and clocks that differ stay as they are however often one asks.
    """
    chain = list(_chain(error))
    for link in chain:
        code, status = _answer(link)
        if code or status:
            return code in _PASSING_CODES or status in _PASSING_STATUS
    if any(isinstance(link, _LASTING) or _kinds(link) & _LASTING_CLASSES for link in chain):
        return False
    return any(
        isinstance(link, (ConnectionError, TimeoutError))
        or (isinstance(link, OSError) and link.errno in _PASSING_ERRNO)
        or bool(_kinds(link) & _PASSING_CLASSES)
        for link in chain
    )


def is_missing_bucket(error: BaseException) -> bool:
    """Whether it is the bucket that does not exist; file systems report it as they do a missing object."""
    return any(_answer(link)[0] == "NoSuchBucket" for link in _chain(error))


def patiently(call: Callable[[], T], *, tell: Callable[[BaseException, float], None], attempts: int | None = None) -> T:
    """Do ``call`` until it succeeds or fails for good: with random, growing waits, for about a minute at most.

    Args:
        call: what may be done more than once.
        tell: is given every transient error and the seconds until the next attempt.
        attempts: at most; None for as many as that minute has room for.

    Raises:
        Exception: the last one of ``call``.
    """

    def before_sleep(state: RetryCallState) -> None:
        assert state.outcome is not None
        assert state.next_action is not None
        tell(state.outcome.exception() or AssertionError("only errors are tried again"), state.next_action.sleep)

    return Retrying(
        retry=retry_if_exception(is_transient),
        wait=wait_random_exponential(multiplier=_FIRST_WAIT_S, max=_LONGEST_WAIT_S),
        stop=stop_after_attempt(attempts or _ATTEMPTS) | stop_after_delay(_PATIENCE_S),
        before_sleep=before_sleep,
        reraise=True,
    )(call)


def explain(error: BaseException, secrets: Collection[str]) -> str:
    """The reason in one line, with *** for every secret in it."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    reason = " ".join(reason.split()) or type(error).__name__
    for secret in sorted({*secrets, *_secrets_of_environment()}, key=len, reverse=True):
        reason = reason.replace(secret, "***")
    return reason


def secrets_of(options: Mapping[str, object], within: str = "") -> Iterator[str]:
    """Text of every storage option that is not known to be public; below four characters it is no secret but a flag."""
    for key, value in options.items():
        if isinstance(value, (list, tuple)):
            yield from secrets_of({f"{key}.{index}": item for index, item in enumerate(value)}, within)
        elif isinstance(value, Mapping):
            yield from secrets_of(value, f"{within}{key}.")
        elif f"{within}{key}" not in PUBLIC_OPTIONS and not isinstance(value, bool) and len(str(value)) >= 4:
            yield str(value)


def _secrets_of_environment() -> Iterator[str]:
    return (value for name, value in os.environ.items() if len(value) >= 8 and _SECRET_VARIABLE.search(name.upper()))


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _answer(error: BaseException) -> tuple[str, int]:
    """A server's error code and HTTP status as botocore, aiohttp, gcsfs and requests keep them; "" and 0 for none."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):
        code = str(response.get("Error", {}).get("Code", ""))
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return code, int(code) if code.isdigit() else int(status)
    for found in (getattr(response, "status_code", 0), getattr(error, "status", 0), getattr(error, "code", 0)):
        if str(found).isdigit() and int(found):
            return "", int(found)
    return "", 0


def _kinds(error: BaseException) -> set[str]:
    """Names of the error's classes, each with the package it is from."""
    return {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
