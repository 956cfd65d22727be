"""Errors of storage, explained in one line without secrets."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from raydfkd.report.redaction import redacted, secrets_of_environment


class StoreError(OSError):
    """A store cannot do what was asked, and trying again did not help; one line that shows no secret."""


class OutageError(StoreError):
    """A store did not answer, or with transient errors, for as long as it was asked again: about a minute."""


class DamagedError(ValueError):
    """An object of a set is not as it was committed; one line that names the object.

    Args:
        uri: of the set, without any password in it.
        path: of the damaged object, relative to the set.
        reason: the damage, as words that follow the object's name.
    """

    def __init__(self, uri: str, path: str, reason: str) -> None:
        super().__init__(uri, path, reason)
        self.path = path
        self.reason = reason
        self._uri = uri

    def __str__(self) -> str:
        return f"{self._uri}/{self.path} {self.reason}"


def is_missing_bucket(error: BaseException) -> bool:
    """Whether the bucket does not exist; file systems report it as they do a missing object."""
    return any(_answer(link)[0] == "NoSuchBucket" for link in _chain(error))


def is_out_of_range(error: BaseException) -> bool:
    """Whether a server has none of the bytes of an object that it was asked for."""
    return any(_answer(link)[0] == "InvalidRange" or _answer(link)[1] == 416 for link in _chain(error))


def explain(error: BaseException, secrets: Collection[str]) -> str:
    """The reason in one line, with *** for every secret in it."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    reason = " ".join(reason.split()) or type(error).__name__
    return redacted(reason, {*secrets, *secrets_of_environment()})


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
