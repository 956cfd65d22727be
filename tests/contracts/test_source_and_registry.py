"""What is read from the source is what the imported registries say, so that the static check has no rule of its own."""

from __future__ import annotations

import math

import pytest
from toy import FAMILIES, shipped

from raydfkd.catalog import REGISTRIES, declared
from raydfkd.registry import RecipeError
from raydfkd.sections import PluginSpec

PLUGINS = [(family, name) for family, registry in FAMILIES.items() for name in shipped(registry)]
VALUES = ("x", "auto", -1, 0, 1, 2.5, math.nan, True, None, [], [1], [0.5, 0.5], [{"steps": 1}], [{"stps": 1}], {})
"""Values that some option accepts and others refuse."""


def outcome(family, name, options):
    """The checked options, or the line that refuses them."""
    try:
        return {option: plain(value) for option, value in family.check(name, options, where="here").items()}
    except RecipeError as error:
        return str(error)


def plain(value):
    """Models as data: their classes are read from the source once and imported once."""
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return value.model_dump() if hasattr(value, "model_dump") else value


@pytest.mark.parametrize("family", REGISTRIES)
def test_family_is_declared_as_it_is_registered(family):
    assert declared(family).family == FAMILIES[family].family
    assert declared(family).names() == shipped(FAMILIES[family])


@pytest.mark.parametrize(("family", "name"), PLUGINS)
def test_plugin_is_documented_alike_in_source_and_registry(family, name):
    assert declared(family).describe(name) == FAMILIES[family].describe(name)
    assert declared(family).declaration(name).doc == FAMILIES[family].declaration(name).doc


@pytest.mark.parametrize(("family", "name"), PLUGINS)
def test_options_have_the_same_schema_in_source_and_registry(family, name):
    static, live = (
        which.declaration(name).model().model_json_schema() for which in (declared(family), FAMILIES[family])
    )
    assert without_descriptions(static) == without_descriptions(live)


def without_descriptions(schema):
    """A model that was read from the source has no file in which pydantic could find its fields' docstrings."""
    if isinstance(schema, list):
        return [without_descriptions(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: without_descriptions(inner) for key, inner in schema.items() if key != "description"}


@pytest.mark.parametrize(("family", "name"), PLUGINS)
def test_options_are_accepted_or_refused_in_the_same_words_by_source_and_registry(family, name):
    option_names = [option.name for option in declared(family).declaration(name).options]
    required = {"steps": 4, "batch_size": 4, "batch_per_class": 4, "stages": [{"steps": 1}], "pixels": 1, "std": 0.5}
    base = {option: value for option, value in required.items() if option in option_names}
    cases = [{}, base, {**base, "nosuch": 1}]
    cases += [{**base, option: value} for option in option_names for value in VALUES]
    cases += [{**base, option[:-1]: 1} for option in option_names]
    for options in cases:
        assert outcome(declared(family), name, options) == outcome(FAMILIES[family], name, options)
    assert isinstance(outcome(declared(family), name, base), dict), "some options are accepted"


@pytest.mark.parametrize("family", REGISTRIES)
def test_unknown_name_is_refused_in_the_same_words_by_source_and_registry(family, monkeypatch):
    ours = shipped(FAMILIES[family])
    monkeypatch.setattr(FAMILIES[family], "names", lambda: ours)
    for name in ("nosuch", declared(family).names()[0][:-1]):
        assert outcome(declared(family), name, {}) == outcome(FAMILIES[family], name, {})


def test_plugin_inside_another_is_an_option_named_after_its_family():
    nested = {
        option.name: option.annotation
        for family, name in PLUGINS
        for option in declared(family).declaration(name).options
        if "PluginSpec" in option.written
    }
    assert nested
    assert all(f"{name}s" in REGISTRIES and annotation is PluginSpec for name, annotation in nested.items())
