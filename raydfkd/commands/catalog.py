"""Texts of `raydfkd show`: recipes, jobs, sections of a recipe and plug-ins with their options and meanings."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, get_origin

from pydantic import BaseModel

from raydfkd.config.describe import (
    OptionDoc,
    describe_option,
    flatten,
    keyed_options,
    options_of,
    sections_in,
)
from raydfkd.config.families import BESIDE, REGISTRIES, family
from raydfkd.config.load import packaged_jobs, packaged_methods, packaged_path, packaged_recipes, page_data
from raydfkd.config.recipe import Recipe
from raydfkd.config.registry import import_callable, options_model
from raydfkd.config.schema import Family
from raydfkd.errors import RecipeError, close_to, did_you_mean

_GROUPS = {"recipes": packaged_recipes, "methods": packaged_methods, "jobs": packaged_jobs}
HINT = (
    "`raydfkd show NAME` explains each of these, and any option or value of a recipe: "
    "show transfer_set, show distill.source.kind, show growing, show torchvision:resnet50"
)


def show(name: str | None) -> Iterator[str]:
    """Lines that explain a recipe, a job, a section, an option, a value, a family or a plug-in; or list them all.

    Raises:
        RecipeError: no such name.
    """
    if name is None:
        yield from _index()
    elif (path := packaged_path(name)) is not None:
        yield path.read_text(encoding="utf-8").rstrip()
        yield from _parts(name) if name in packaged_methods() else ()
    elif name in _GROUPS:
        yield from _recipes(name)
    elif ":" in name:
        yield from _callable(name)
    else:
        yield from _explained(name)


def _index() -> Iterator[str]:
    for group in _GROUPS:
        yield from (*_recipes(group), "")
    yield "sections of a recipe"
    for key, model in _sections().items():
        yield f"  {key:28} {_first_line(model.__doc__)}"
    for key in REGISTRIES:
        yield from ("", key)
        for plugin in family(key).names():
            yield f"  {plugin:28} {_first_line(family(key).describe(plugin)[0])}"
        for form, meaning in BESIDE[key]:
            yield f"  {form:28} {meaning}"
    yield from ("", HINT)


def _recipes(group: str) -> Iterator[str]:
    yield group
    for name in _GROUPS[group]():
        path = packaged_path(name)
        assert path is not None, "it is one of the packaged ones"
        yield f"  {name:28} {path.read_text(encoding='utf-8').partition(chr(10))[0].lstrip('# ')}"


_OF_KEY = {
    "synthesizer": "synthesizers",
    "generator": "generators",
    "objective": "terms",
    "of": "terms",
    "targets": "targets",
    "augment": "augmentations",
    "select": "selectors",
    "criterion": "criteria",
    "source": "sources",
}
"""The family of the plug-ins that stand at a key of a page."""


def _parts(name: str) -> Iterator[str]:
    """A line on each plug-in that a packaged page chooses, with what it starts from."""
    chosen = dict.fromkeys(_chosen(page_data(name), ""))
    if chosen:
        yield from ("", "its parts, with what it starts from; `raydfkd show NAME` explains each whole:")
    for key, plugin in chosen:
        if plugin in family(key).names():
            yield f"  {plugin:28} {_first_line(family(key).describe(plugin)[0])}"


def _chosen(value: object, key: str) -> Iterator[tuple[str, str]]:
    """Family and name of each plug-in in plain data that stand at ``key``."""
    if isinstance(value, str) and key in _OF_KEY:
        yield _OF_KEY[key], value
    elif isinstance(value, list):
        for item in value:
            yield from _chosen(item, key)
    elif isinstance(value, dict):
        named = value.get("term", value.get("kind"))
        if isinstance(named, str) and key in _OF_KEY:
            yield _OF_KEY[key], named
        for inner, item in value.items():
            yield from _chosen(item, inner)


def _explained(name: str) -> Iterator[str]:
    """The lines on that name. Plug-ins, which take importing torch, are asked only if the schema has no such name."""
    sections = [key for key, model in _sections().items() if _is_called(key, name) or _is_class(model, name)]
    options = keyed_options(Recipe)
    found = [line for key in sections for line in _section(key, _sections()[key])]
    if name in REGISTRIES:
        found += _family(name)
    elif not sections and name not in options:
        found += [line for key in REGISTRIES if name in family(key).names() for line in _plugin(key, name, whole=True)]
        found += _inside_plugins(name)
        options |= _plugin_options()
    named = [key for key in options if _is_called(key, name) and key not in sections]
    chosen = [key for key, option in options.items() if name in option.choices]
    found += [f"{key:30} {options[key]}" for key in dict.fromkeys([*named, *chosen])]
    families = {of for key, of in _family_fields().items() if _is_called(key, name.removesuffix(".kind"))}
    found += [line for of in sorted(families - {name}) for line in _family(of)]
    section, _, last = name.rpartition(".")
    if not found and section.partition(".")[0] in _sections():  # the option of a plug-in by its place in a recipe
        own = {key: option for key, option in _plugin_options().items() if _is_called(key, last)}
        found += [*_inside_plugins(last), *(f"{key:30} {option}" for key, option in own.items())]
        found = found or list(_explained(last))
    if not found:
        meant = close_to(name, _names(options))
        remedy = f"did you mean {meant}?" if meant else "`raydfkd show` lists what there is"
        raise RecipeError(f"there is nothing called {name!r}; {remedy}")
    yield from found


def _inside_plugins(name: str) -> list[str]:
    """Sections of that name inside the options of plug-ins, each once."""
    sections = (found for plugin, model in _plugin_models() for found in sections_in(model, f"{plugin}."))
    inside = {model: key for key, model in sections if _is_called(key, name) or _is_class(model, name)}
    return [line for model, key in inside.items() for line in _section(key, model)]


def _names(options: dict[str, OptionDoc]) -> set[str]:
    """Everything that can be asked for by one word."""
    plugins = {plugin for key in REGISTRIES for plugin in family(key).names()}
    words = {key.rpartition(".")[2] for key in (*_sections(), *options)}
    values = {value for option in options.values() for value in option.choices}
    packaged = {name for names in _GROUPS.values() for name in names()}
    return {*packaged, *_GROUPS, *REGISTRIES, *plugins, *words, *values}


def _is_called(key: str, name: str) -> bool:
    """Whether a dotted key ends in ``name``; entries of lists have any number."""
    return f".{key}".endswith(f".{name}") or f".{key.replace('.0.', '.')}".endswith(f".{name}")


def _is_class(model: type[BaseModel], name: str) -> bool:
    return name.lower() in (model.__name__.lower(), model.__name__.lower().removesuffix("spec"))


def _sections() -> dict[str, type[BaseModel]]:
    return {"recipe": Recipe, **dict(sections_in(Recipe))}


def _family_fields() -> dict[str, str]:
    """Dotted keys whose values are plug-ins, each with its family."""
    return {
        f"{key}.{name}".removeprefix("recipe."): leaf.name
        for key, model in _sections().items()
        for name, field in model.model_fields.items()
        for leaf in flatten((field.annotation, *field.metadata))
        if isinstance(leaf, Family)
    }


def _plugin_options() -> dict[str, OptionDoc]:
    """Every option of every plug-in, and of the sections in them, by the plug-in's name and its own."""
    return {
        key: option for plugin, model in _plugin_models() for key, option in keyed_options(model, f"{plugin}.").items()
    }


def _plugin_models() -> Iterator[tuple[str, type[BaseModel]]]:
    """Name of every plug-in, and the model of its options."""
    for key in REGISTRIES:
        for plugin in family(key).names():
            yield plugin, options_model(family(key).get(plugin, where=key))


def _section(key: str, model: type[BaseModel]) -> Iterator[str]:
    """A section with its options, and those of the sections in it; of the recipe itself only its own."""
    yield f"{key:30} {' '.join((model.__doc__ or '').split())}"
    yield from _section_options(model, "", nested=model is not Recipe)


def _section_options(model: type[BaseModel], where: str, *, nested: bool) -> Iterator[str]:
    inner = dict(sections_in(model))
    for option, field in zip(options_of(model), model.model_fields.values(), strict=True):
        key = f"{where}{option.name}"
        if option.name not in inner:
            yield f"  {key:28} {option}"
            continue
        need = "required" if field.is_required() else "null unless given" if field.default is None else "optional"
        is_list = any(get_origin(leaf) is tuple for leaf in flatten(field.annotation))
        yield f"  {key:28} {option.meaning} [{'list of sections' if is_list else 'section'}, {need}]"
        if nested:
            yield from _section_options(inner[option.name], f"{key}.", nested=True)


def _family(key: str) -> Iterator[str]:
    yield key
    for plugin in family(key).names():
        yield from _plugin(key, plugin)
    for form, meaning in BESIDE[key]:
        yield f"  {form:28} {meaning}"


def _plugin(key: str, name: str, *, whole: bool = False) -> Iterator[str]:
    doc, options = family(key).describe(name)
    yield from _described(name, doc, options, whole=whole)


def _described(name: str, doc: str, options: Iterable[OptionDoc], *, whole: bool) -> Iterator[str]:
    first, _, rest = doc.replace("``", "`").partition("\n")
    yield f"  {name:28} {first}"
    if whole and rest.strip():
        yield textwrap.indent(rest.strip("\n"), "    ")
    for option in options:
        yield f"    {option.name:26} {option}"


def _callable(name: str) -> Iterator[str]:
    """A network or a data set of torchvision, or code of the user's, with what can be given as options."""
    package, _, attribute = name.partition(":")
    if package != "torchvision":
        factory = import_callable(name, where="show")
        doc = (inspect.getdoc(factory) or "(it has no docstring)").partition("Args:")[0].strip()
        yield from _described(name, doc, _keywords(factory), whole=True)
        return
    from torchvision import models

    from raydfkd.images.torchvision_data import SETS

    if attribute in SETS:
        yield from _plugin("real_data", name, whole=True)
        return
    if attribute not in models.list_models():
        raise RecipeError(f"torchvision has no {attribute!r}; {did_you_mean(attribute, models.list_models())}")
    builder = models.get_model_builder(attribute)
    made = inspect.signature(builder, eval_str=True).return_annotation
    options = {option.name: option for part in (made, builder) for option in _keywords(part)}
    given = [option for option in options.values() if option.default != "required" and option.name != "num_classes"]
    doc = f"Network of torchvision with teacher.classes outputs.\n{inspect.getdoc(builder) or ''}".partition("Args:")[0]
    yield from _described(name, doc.strip(), given, whole=True)
    yield "  Such options go under `teacher.options` or `student.options`; they are torchvision's, which explains them."


def _keywords(factory: Any) -> list[OptionDoc]:
    """Parameters of a callable that can be given by name, with a default or without; no ``*args`` or ``**kwargs``."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return []
    return [
        describe_option(
            parameter.name,
            parameter.annotation if parameter.annotation is not parameter.empty else Any,
            ... if parameter.default is parameter.empty else parameter.default,
            "",
        )
        for parameter in parameters
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]


def _first_line(doc: str | None) -> str:
    return " ".join((doc or "").partition("\n\n")[0].split())
