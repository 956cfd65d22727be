"""Mistakes of the user's, and how their one line is put."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any


class RecipeError(ValueError):
    """A mistake of the user's, found before work begins; the message names key, value and remedy in one line."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Say which of ``known`` the user probably meant, or list them all."""
    options = sorted(known)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    return f"known: {', '.join(options)}" if options else "there are none"


def one_line(error: BaseException) -> str:
    """What an error says, its name where it says nothing, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def differences(there: Mapping[str, Any], here: Mapping[str, Any], within: str = "") -> list[str]:
    """Dotted keys at which two trees of plain data differ, with both values: ``steps is 150 there and 4 here``."""
    found = []
    for key in dict.fromkeys((*there, *here)):
        one, other = there.get(key), here.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, f"{within}{key}.")
        elif isinstance(one, list) and isinstance(other, list) and one != other and len(one) == len(other):
            found += differences(dict(_numbered(one)), dict(_numbered(other)), f"{within}{key}.")
        elif one != other:
            found.append(f"{within}{key} is {_short(one)} there and {_short(other)} here")
    return found


def _numbered(items: list[Any]) -> list[tuple[str, Any]]:
    return [(str(index), item) for index, item in enumerate(items)]


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
