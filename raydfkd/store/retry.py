"""Retries of storage operations after transient errors."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    wait_random_exponential,
)

from raydfkd.store.errors import _answer, _chain

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


T = TypeVar("T")


def is_transient(error: BaseException) -> bool:
    """Whether a file system's error is transient: throttling, 5xx, a time-out, a connection that was lost.

    The server's answer decides if there is one in the chain of causes; credentials, permissions, missing
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


def patiently(call: Callable[[], T], *, tell: Callable[[BaseException, float], None], attempts: int | None = None) -> T:
    """Do ``call`` until it succeeds or fails for good: with random, growing waits, for at most about a minute.

    Args:
        call: an operation that may be done more than once.
        tell: is given every transient error and the seconds until the next attempt.
        attempts: maximum of attempts; None for as many as that minute has room for.

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


def _kinds(error: BaseException) -> set[str]:
    """Names of the error's classes, each with the package it is from."""
    return {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
