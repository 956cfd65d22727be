"""Options of sections and plug-ins in plain words: type, range, default, meaning."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from raydfkd.config.schema import Family, PluginSpec

_WORDS: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("whole number", "whole numbers"),
    float: ("number", "numbers"),
    str: ("text", "texts"),
    NoneType: ("null", "null"),
    Any: ("anything", "anything"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionDoc:
    """One option of a section or plug-in, as ``raydfkd show`` prints it."""

    name: str
    type: str
    default: str
    meaning: str
    choices: tuple[str, ...] = ()
    """Values that it may have, where that is a closed choice."""

    def __str__(self) -> str:
        default = self.default if self.default == "required" else f"default {self.default}"
        return f"{self.meaning} [{self.type}, {default}]".lstrip()


def describe_option(name: str, annotation: Any, default: Any, meaning: str) -> OptionDoc:
    """Put an option into words; ``default`` is ``...`` where it has to be given."""
    return OptionDoc(
        name=name,
        type=in_words(annotation),
        default="required" if default is ... else _as_json(default),
        meaning=" ".join(meaning.replace("``", "`").split()),
        choices=tuple(choice for choice in choices_in(annotation) if isinstance(choice, str)),
    )


@cache
def options_of(model: type[BaseModel]) -> tuple[OptionDoc, ...]:
    """Every option of a section or plug-in, those that are sections themselves included."""
    return tuple(
        describe_option(
            field.alias or name,
            annotation_of(field),
            ... if field.is_required() else field.default,
            field.description or "",
        )
        for name, field in model.model_fields.items()
    )


def keyed_options(model: type[BaseModel], where: str = "") -> dict[str, OptionDoc]:
    """Every option of ``model`` and of the sections in it by its dotted key; those keys begin with ``where``."""
    sections = [("", model), *((f"{key}.", inner) for key, inner in sections_in(model))]
    return {f"{where}{key}{option.name}": option for key, inner in sections for option in options_of(inner)}


def annotation_of(field: FieldInfo) -> Any:
    """The annotation of a field with the metadata that pydantic took out of it."""
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation allows, alone, in a list or as one of several forms."""
    leaves = (leaf for leaf in flatten(annotation) if inspect.isclass(leaf) and issubclass(leaf, BaseModel))
    return next(leaves, None)


def sections_in(model: type[BaseModel], where: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Dotted key and model of every section inside ``model``; plug-ins are not sections."""
    for name, inner in _own_sections(model):
        yield f"{where}{name}", inner
        yield from sections_in(inner, f"{where}{name}.")


@cache
def _own_sections(model: type[BaseModel]) -> tuple[tuple[str, type[BaseModel]], ...]:
    found = ((name, model_in(field.annotation)) for name, field in model.model_fields.items())
    return tuple((name, inner) for name, inner in found if inner is not None and inner is not PluginSpec)


def flatten(annotation: Any) -> list[Any]:
    """An annotation with everything inside it, metadata of ``Annotated`` included."""
    inner = annotation if isinstance(annotation, tuple) else get_args(annotation)
    return [annotation, *(leaf for argument in inner for leaf in flatten(argument))]


def choices_in(annotation: Any) -> list[Any]:
    """Every value of the closed choices in an annotation."""
    return [choice for leaf in flatten(annotation) if get_origin(leaf) is Literal for choice in get_args(leaf)]


def in_words(annotation: Any, *, many: bool = False) -> str:
    """An annotation as a user would say it: ``Annotated[int, Field(ge=1)]`` is "whole number, at least 1"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _WORDS:
        words = _WORDS[annotation][many]
    elif origin is Annotated:
        words = _annotated(arguments[0], arguments[1:], many=many)
    elif origin is Literal:
        words = _listed([_as_json(choice).strip('"') for choice in arguments])
    elif origin in (Union, UnionType):
        words = " or ".join(in_words(argument, many=many) for argument in arguments)
    elif origin is dict:
        words = f"mapping of names to {in_words(arguments[1], many=True)}"
    elif origin in (tuple, list) and (origin is list or arguments[-1] is ...):
        words = f"list of {in_words(arguments[0], many=True)}"
    elif origin is tuple:
        words = f"[{', '.join(in_words(argument) for argument in arguments)}]"
    else:
        words = getattr(annotation, "__name__", str(annotation))
    return words


def _annotated(inner: Any, metadata: tuple[Any, ...], *, many: bool) -> str:
    marks = [mark for part in metadata for mark in (part.metadata if isinstance(part, FieldInfo) else [part])]
    family = next((mark.name for mark in marks if isinstance(mark, Family)), None)
    if family is not None:
        return f"plug-in{'s' if many else ''} of the family {family}"
    words = in_words(inner, many=many)
    limits = _limits(marks)
    return f"{words}, {limits}" if limits else words


def _limits(marks: list[Any]) -> str:
    low = next((mark.ge for mark in marks if isinstance(mark, Ge)), None)
    high = next((mark.le for mark in marks if isinstance(mark, Le)), None)
    limits = [f"from {low} to {high}"] if None not in (low, high) else []
    limits += [f"at least {low}"] if low is not None and high is None else []
    limits += [f"at most {high}"] if high is not None and low is None else []
    limits += [f"above {mark.gt}" for mark in marks if isinstance(mark, Gt)]
    limits += [f"below {mark.lt}" for mark in marks if isinstance(mark, Lt)]
    return " and ".join(limits)


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _as_json(value: Any) -> str:
    def plain(inner: Any) -> Any:
        return inner.model_dump(mode="json") if isinstance(inner, BaseModel) else getattr(inner, "__name__", str(inner))

    return json.dumps(value, default=plain)
