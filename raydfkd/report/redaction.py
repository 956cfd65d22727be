"""Redaction: what is secret in a text, a recipe or a command, and the stars that stand there instead."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

SECRET = "***"  # noqa: S105 - what is shown instead
STORAGE_OPTIONS = "storage_options"
"""The key of a recipe whose values are secrets."""
PUBLIC_OPTIONS = frozenset({"endpoint_url", "client_kwargs.endpoint_url", "client_kwargs.region_name", "profile"})
"""Storage options that an error may show, because it is of no use without them."""
_SECRET_VARIABLE = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|PRIVATE|(ACCESS|API|ACCOUNT|STORAGE)_KEY")
_QUERY = re.compile(r"(\w://[^\s'\"?]*)\?[^\s'\"]+")
_LOGIN = re.compile(r"(\w:)//[^/\s'\"]*@")


def redacted(text: str, secrets: Collection[str] = ()) -> str:
    """The text with *** for each of ``secrets``, for the login in a URL, and for its query, as presigned ones have it.

    Everything that raydfkd writes to a file, a log or a terminal and that may hold a URL or an option comes through
    here.
    """
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, SECRET)
    text = _QUERY.sub(rf"\1?{SECRET}", text)
    return _LOGIN.sub(rf"\1//{SECRET}@", text)


def redacted_data(value: Any) -> Any:
    """Plain data with ``redacted`` texts in it, and with *** for whatever stands under storage options."""
    if isinstance(value, Mapping):
        return {
            key: dict.fromkeys(inner, SECRET)
            if key == STORAGE_OPTIONS and isinstance(inner, Mapping)
            else redacted_data(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [redacted_data(inner) for inner in value]
    return redacted(value) if isinstance(value, str) else value


def redacted_at(key: str, value: Any) -> Any:
    """The value at a dotted key of a recipe: as ``redacted_data``, and *** for all that stands in storage options."""
    return SECRET if STORAGE_OPTIONS in key.split(".") else redacted_data(value)


def redacted_setting(setting: str) -> str:
    """One argument of a command: as ``redacted``, and with *** for the whole value where storage options are in it."""
    key, equals, _ = setting.partition("=")
    return f"{key}={SECRET}" if equals and STORAGE_OPTIONS in setting else redacted(setting)


def is_redacted(text: str) -> bool:
    """Whether ``redacted`` has taken something out of a text, which is of no use any more as a URL or an option."""
    return text == SECRET or f"//{SECRET}@" in text or f"?{SECRET}" in text


def secrets_of(options: Mapping[str, object], within: str = "") -> Iterator[str]:
    """Text of every storage option that is not known to be public; below four characters it is no secret but a flag."""
    for key, value in options.items():
        if isinstance(value, (list, tuple)):
            yield from secrets_of({f"{key}.{index}": item for index, item in enumerate(value)}, within)
        elif isinstance(value, Mapping):
            yield from secrets_of(value, f"{within}{key}.")
        elif f"{within}{key}" not in PUBLIC_OPTIONS and not isinstance(value, bool) and len(str(value)) >= 4:
            yield str(value)


def secrets_of_settings(arguments: Collection[str]) -> Iterator[str]:
    """What may be a secret in the arguments of a command: words beside storage options, and those of URLs."""
    for argument in arguments:
        yield from secrets_in(argument)
        key, equals, value = argument.partition("=")
        if equals and STORAGE_OPTIONS in argument:
            yield from (word for word in re.findall(r"[^\s{}:,'\"]+", value) if len(word) >= 4)
            yield from ([value] if STORAGE_OPTIONS in key and len(value) >= 4 else [])


def secrets_in(url: str) -> Iterator[str]:
    """Login, password and query of a URL, which its file system may name by themselves."""
    for login in re.findall(r"\w://([^/\s'\"]*)@", url):
        yield from (part for part in (login, login.partition(":")[2]) if part)
    query = url.partition("?")[2] if "://" in url else ""
    yield from (part for part in (query, *re.split(r"[&=]", query)) if len(part) >= 8)


def secrets_of_environment() -> Iterator[str]:
    """Values of the environment's variables that are called like secrets."""
    return (value for name, value in os.environ.items() if len(value) >= 8 and _SECRET_VARIABLE.search(name.upper()))
