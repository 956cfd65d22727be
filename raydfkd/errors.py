"""Mistakes of the user's, and how their one line is put."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raydfkd.report.redaction import redacted


class RecipeError(ValueError):
    """A mistake of the user's, found before work begins; the message names key, value and remedy in one line.

    Of several mistakes that were found at once, each has a line and an argument. No secret of a URL is in them.
    """

    def __init__(self, *mistakes: object) -> None:
        super().__init__(*(redacted(str(mistake)) for mistake in mistakes))

    def __str__(self) -> str:
        return "\n".join(self.lines)

    @property
    def lines(self) -> tuple[str, ...]:
        """A line for each mistake."""
        return tuple(" ".join(str(mistake).splitlines()) for mistake in self.args)


class MissingError(RecipeError):
    """Something that a recipe names is not here: a package that is not installed, a file, a hub out of reach."""


class Mistakes:
    """Gathers the mistakes in parts that do not depend on each other, so that all of them are said at once."""

    def __init__(self) -> None:
        self._lines: dict[str, None] = {}
        self._first: RecipeError | None = None

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Keep the RecipeError that ends the block, and go on after it."""
        try:
            yield
        except RecipeError as error:
            self._lines.update(dict.fromkeys(error.lines))
            self._first = self._first or error

    def complain(self) -> None:
        """Raise everything that was found.

        Raises:
            RecipeError: there was something.
        """
        if self._lines:
            raise RecipeError(*self._lines) from self._first


def read_text(path: str | Path, failing: str) -> str:
    """The text of a file; ``failing`` begins the line where it cannot be read.

    Raises:
        RecipeError: it cannot.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise RecipeError(f"{failing}: {reason}") from None


def close_to(word: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that the user probably meant."""
    options = sorted(known)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    longer = [option for option in options if word in option.split("_")]
    return close[0] if close else longer[0] if len(longer) == 1 else None


class RunError(RuntimeError):
    """The run cannot go on, and the recipe is not to blame; the message says why and the remedy in one line."""


class StudentDivergedError(RunError):
    """The student's loss or weights became NaN or infinite; the message names step, learning rate and remedy."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Say which of ``known`` the user probably meant, or list them all."""
    options = sorted(known)
    close = close_to(word, options)
    if close is not None:
        return f"did you mean {close}?"
    return f"known: {', '.join(options)}" if options else "there are none"


def one_line(error: BaseException) -> str:
    """What an error says, its name where it says nothing, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def last_line(error: BaseException) -> str:
    """The last line of what an error says, its name where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else one_line(error)


_MISSING = object()


def differences(there: Any, here: Any, where: str = "") -> list[str]:
    """Keys at which two trees of plain data differ, as ``--set`` takes them, with both values.

    Such as ``synthesis.steps is 150 there and 4 here``.
    """
    if isinstance(there, Mapping) and isinstance(here, Mapping) and there.get("kind") == here.get("kind"):
        keys = dict.fromkeys((*there, *here))
        return [
            line
            for key in keys
            for line in differences(there.get(key, _MISSING), here.get(key, _MISSING), f"{where}.{key}".lstrip("."))
        ]
    if isinstance(there, list) and isinstance(here, list) and _entries(there) == _entries(here) != []:
        named = zip(_entries(there), there, here, strict=True)
        return [line for entry, one, other in named for line in differences(one, other, f"{where}.{entry}")]
    return [] if there == here else [f"{where} is {_short(there)} there and {_short(here)} here"]


def _entries(values: list[Any]) -> list[str]:
    """How ``--set`` addresses what is in a list of plug-ins or terms; lists of other things differ as a whole."""
    if not all(isinstance(value, dict) for value in values):
        return []
    names = [str(value.get("name") or value.get("kind") or index) for index, value in enumerate(values)]
    return names if len(set(names)) == len(names) else [str(index) for index in range(len(values))]


def _short(value: Any) -> str:
    if value is _MISSING:
        return "not given"
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
