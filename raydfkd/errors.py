"""Mistakes of the user's, and how their one line is put."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RecipeError(ValueError):
    """A mistake of the user's, found before work begins; the message names key, value and remedy in one line."""


class StudentDivergedError(RuntimeError):
    """The student's loss or weights became NaN or infinite; the message names step, learning rate and remedy."""


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
