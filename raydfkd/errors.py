"""Mistakes of the user's, and how their one line is put."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class RecipeError(ValueError):
    """A mistake of the user's, found before work begins; the message names key, value and remedy in one line.

    Of several mistakes that were found at once, each has a line and an argument.
    """

    def __str__(self) -> str:
        return "\n".join(self.lines)

    @property
    def lines(self) -> tuple[str, ...]:
        """A line for each mistake."""
        return tuple(" ".join(str(mistake).splitlines()) for mistake in self.args)


class Mistakes:
    """Gathers the mistakes in parts that do not depend on each other, so that all of them are said at once."""

    def __init__(self) -> None:
        self._lines: dict[str, None] = {}

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Keep the RecipeError that ends the block, and go on after it."""
        try:
            yield
        except RecipeError as error:
            self._lines.update(dict.fromkeys(error.lines))

    def complain(self) -> None:
        """Raise everything that was found.

        Raises:
            RecipeError: there was something.
        """
        if self._lines:
            raise RecipeError(*self._lines)


def close_to(word: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that the user probably meant."""
    options = sorted(known)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    longer = [option for option in options if word in option.split("_")]
    return close[0] if close else longer[0] if len(longer) == 1 else None


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
