from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from raydfkd.config.describe import describe_option, in_words, keyed_options, options_of, sections_in
from raydfkd.config.recipe import Recipe
from raydfkd.config.schema import (
    Augmentation,
    BelowOne,
    Fraction,
    Generator,
    Positive,
    PositiveFloat,
    Range,
    Size,
    Spec,
    Text,
)


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "whole number"),
        (Positive, "whole number, at least 1"),
        (Positive | None, "whole number, at least 1 or null"),
        (PositiveFloat, "number, above 0"),
        (Fraction, "number, from 0 to 1"),
        (BelowOne, "number, at least 0 and below 1"),
        (Annotated[int, Field(le=3)], "whole number, at most 3"),
        (Text, "text"),
        (Literal["a", "b", "c"], "a, b or c"),
        (bool | Literal["auto"], "true or false or auto"),
        (tuple[int, ...], "list of whole numbers"),
        (list[str], "list of texts"),
        (tuple[BelowOne, BelowOne], "[number, at least 0 and below 1, number, at least 0 and below 1]"),
        (dict[str, PositiveFloat], "mapping of names to numbers, above 0"),
        (dict[str, Any], "mapping of names to anything"),
        (tuple[Augmentation, ...], "list of plug-ins of the family augmentations"),
        (Generator, "plug-in of the family generators"),
        (Range, "Range"),
        (Size, "whole number or [whole number, whole number]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "type",  # which may have an address in its name
)
def test_type_is_said_in_plain_words(annotation, words):
    assert in_words(annotation) == words


def test_option_that_has_to_be_given_has_no_default():
    assert str(describe_option("steps", Positive, ..., "steps.")) == "steps. [whole number, at least 1, required]"
    assert str(describe_option("kind", Literal["a", "b"], "a", "")) == '[a or b, default "a"]'
    assert describe_option("kind", Literal["a", "b"], "a", "").choices == ("a", "b")


class Wheel(Spec):
    """A wheel."""

    spokes: Positive = 36
    """Spokes between hub and rim."""


class Bicycle(Spec):
    """Two of them."""

    name: Text
    """What it is called."""
    wheels: tuple[Wheel, ...] = ()
    """Its wheels."""


def test_options_of_sections_are_keyed_by_the_way_to_them():
    assert {key: option.meaning for key, option in keyed_options(Bicycle, "mine.").items()} == {
        "mine.name": "What it is called.",
        "mine.wheels": "Its wheels.",
        "mine.wheels.spokes": "Spokes between hub and rim.",
    }


@pytest.mark.parametrize(("key", "model"), [("recipe", Recipe), *sections_in(Recipe)])
def test_every_option_of_the_schema_has_a_sentence(key, model):
    for option in options_of(model):
        assert option.meaning, f"{key}.{option.name} is described"
        assert option.meaning[0].isupper() or option.meaning[0] == "`"
        assert option.meaning.endswith(".")
