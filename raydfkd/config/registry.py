"""Names in a recipe become objects here, with errors that say what would have been right."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails

from raydfkd.config.describe import OptionDoc, flatten, model_in, options_of
from raydfkd.config.schema import Family, PluginSpec
from raydfkd.errors import RecipeError, close_to, did_you_mean, one_line
from raydfkd.report.redaction import redacted_at

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Registry(Generic[T]):
    """A family of plug-ins: registered ones by name, the user's own as ``module:Class``.

    A plug-in's *options* are the keyword-only arguments of its constructor and come from the recipe, checked against
    their annotations; its positional arguments are what the engine supplies.

    Args:
        family: what one of them is called, for messages.
        modules: those that register plug-ins of the family; imported when the first name is asked for.
        member: attribute that every plug-in of the family has, so that code of another kind is refused by name.
    """

    def __init__(self, family: str, modules: Iterable[str], *, member: str = "__call__") -> None:
        self.family = family
        self._modules = tuple(modules)
        self._member = member
        self._factories: dict[str, Callable[..., T]] = {}
        self._forms: dict[str, Callable[[str, str], Callable[..., T]]] = {}

    def register(self, name: str) -> Callable[[F], F]:
        """Make a class or function known under ``name``; a name can be taken once."""

        def add(factory: F) -> F:
            assert name not in self._factories, f"{self.family} {name} is registered twice"
            self._factories[name] = factory
            return factory

        return add

    def form(self, prefix: str) -> Callable[[F], F]:
        """Make names of the form ``prefix:NAME`` known.

        A function that is given the NAME, and the recipe key to blame, returns the constructor of that plug-in.
        """

        def add(factory_of: F) -> F:
            assert prefix not in self._forms, f"{self.family} {prefix}: is registered twice"
            self._forms[prefix] = factory_of
            return factory_of

        return add

    def names(self) -> list[str]:
        """Every registered name, sorted."""
        self._import()
        return sorted(self._factories)

    def is_own(self, name: str) -> bool:
        """Whether a name is that of code of the user's."""
        self._import()
        prefix, colon, _ = name.partition(":")
        return bool(colon) and prefix not in self._forms

    def _import(self) -> None:
        for module in self._modules:
            importlib.import_module(module)

    def get(self, name: str, *, where: str) -> Callable[..., T]:
        """Look ``name`` up, or import it where it is ``module:Class``; ``where`` is the recipe key to blame."""
        if self.is_own(name):
            factory: Callable[..., T] = import_callable(name, where=where)
            return factory
        prefix, colon, rest = name.partition(":")
        if colon:
            return self._forms[prefix](rest, where)
        if name not in self.names():
            raise RecipeError(f"{where}: unknown {self.family} {name!r}; {did_you_mean(name, self.names())}")
        return self._factories[name]

    def check(
        self, name: str, options: Mapping[str, Any], *, where: str, elsewhere: Iterable[str] = ()
    ) -> dict[str, Any]:
        """Validate ``options`` against the constructor's annotations without constructing anything.

        An unknown option may be one of the dotted keys ``elsewhere``.

        Raises:
            RecipeError: unknown name or option, or an option of the wrong type or out of its range.
        """
        model = options_model(self.get(name, where=where))
        try:
            value = model.model_validate_json(json.dumps(_completed(options, model)), strict=True)
        except ValidationError as error:
            raise RecipeError(*explain(error, where, model, elsewhere=elsewhere)) from None
        return {field: getattr(value, field) for field in model.model_fields}

    def nested(
        self, name: str, options: Mapping[str, Any], *, where: str, elsewhere: Iterable[str] = ()
    ) -> Iterator[Chosen]:
        """The plug-ins that ``options``, which are checked first, choose inside this one."""
        model = options_model(self.get(name, where=where))
        checked = self.check(name, options, where=where, elsewhere=elsewhere)
        yield from chosen_in(model, checked, where)

    def build(self, name: str, options: Mapping[str, Any], *supplied: Any, where: str) -> T:
        """Construct the plug-in ``name`` from engine-``supplied`` arguments and recipe ``options``.

        Raises:
            RecipeError: what :meth:`check` finds, or the constructor's own complaint.
        """
        checked = self.check(name, options, where=where)
        factory = self.get(name, where=where)
        try:
            inspect.signature(factory).bind(*supplied, **checked)
        except TypeError as error:
            raise RecipeError(
                f"{where}: {name} does not take what a {self.family} is given ({error}), so it is none"
            ) from None
        try:
            built = factory(*supplied, **checked)
        except RecipeError:
            raise
        except ValueError as error:
            raise RecipeError(f"{where}: {error}") from error
        if not hasattr(built, self._member):
            raise RecipeError(
                f"{where}: {name} makes a {type(built).__name__} without {self._member}, so it is no {self.family}"
            )
        return built

    def options(self, name: str) -> list[str]:
        """Names of the options of plug-in ``name``."""
        return [parameter.name for parameter in _keyword_only(self.get(name, where=self.family))]

    def describe(self, name: str) -> tuple[str, tuple[OptionDoc, ...]]:
        """The docstring of plug-in ``name`` without its arguments, and its options."""
        factory = self.get(name, where=self.family)
        return (inspect.getdoc(factory) or "").partition("Args:")[0].strip(), options_of(options_model(factory))


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A plug-in as a recipe chooses it."""

    family: str
    """Key of ``families.REGISTRIES``."""
    name: str
    options: Mapping[str, Any]
    where: str
    """Recipe key, for messages."""


def chosen_in(model: type[BaseModel], values: Mapping[str, Any], where: str) -> Iterator[Chosen]:
    """Every plug-in that the fields of a model choose, wherever they stand in it: by their ``Family`` annotations."""
    for name, field in model.model_fields.items():
        if name in values:
            key = f"{where}.{name}".lstrip(".")
            yield from _chosen(values[name], (field.annotation, *field.metadata), key)


def _chosen(value: Any, annotation: Any, where: str) -> Iterator[Chosen]:
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _chosen(item, annotation, f"{where}[{index}]")
    elif isinstance(value, PluginSpec):
        family = next((leaf.name for leaf in flatten(annotation) if isinstance(leaf, Family)), None)
        assert family is not None, f"{where} has an annotation that names its family"
        yield Chosen(family=family, name=value.kind, options=value.options, where=where)
    if isinstance(value, BaseModel):
        yield from chosen_in(type(value), dict(value), where)


def import_callable(name: str, *, where: str) -> Any:
    """Import the callable that ``module:callable`` names.

    Raises:
        RecipeError: it cannot be imported, whatever its module raises.
    """
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # a module of the user's may raise anything
        raise RecipeError(f"{where} is {name!r}, which cannot be imported: {one_line(error)}") from error
    if not callable(found):
        raise RecipeError(f"{where} is {name!r}, which is no class or function but {type(found).__name__}")
    return found


def meanings_of(doc: str) -> dict[str, str]:
    """Name and meaning of each entry under ``Args:``, continuation lines joined."""
    entries = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)$", doc.partition("Args:")[2], flags=re.MULTILINE)
    return {name: " ".join(meaning.split()) for name, meaning in entries}


def _keyword_only(factory: Callable[..., Any]) -> list[inspect.Parameter]:
    parameters = inspect.signature(factory).parameters.values()
    return [parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


@cache
def options_model(factory: Callable[..., Any]) -> type[BaseModel]:
    """The pydantic model that validates the options of a plug-in in a recipe, and has their meanings."""
    initializer = factory.__init__ if inspect.isclass(factory) else factory
    namespace = getattr(initializer, "__globals__", {})
    meanings = meanings_of(inspect.getdoc(factory) or "")
    fields: dict[str, Any] = {
        parameter.name: (
            _evaluated(parameter.annotation, namespace),
            Field(
                ... if parameter.default is parameter.empty else parameter.default,
                description=meanings.get(parameter.name),
            ),
        )
        for parameter in _keyword_only(factory)
    }
    return create_model("Options", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)


def _completed(options: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """``options`` in which a plug-in whose name is not given is the default one: ``generator: {width: 32}``."""
    completed = dict(options)
    for key, value in options.items():
        field = model.model_fields.get(key)
        if field is not None and isinstance(field.default, PluginSpec) and isinstance(value, dict):
            completed[key] = {**field.default.model_dump(), **value} if "kind" not in value else value
    return completed


def _evaluated(annotation: Any, namespace: dict[str, Any]) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    return eval(annotation, namespace) if isinstance(annotation, str) else annotation


def explain(error: ValidationError, where: str, model: type[BaseModel], *, elsewhere: Iterable[str] = ()) -> list[str]:
    """Put each finding of a pydantic ``error`` into a line with key, value and remedy.

    A missing key that is there misspelled is one mistake, and so are the forms of one value of which none fits.

    Args:
        error: the error that validating ``model`` raised.
        where: key of the model's place in the recipe.
        model: the model that was validated.
        elsewhere: dotted keys of other places, of which an unknown one may be.
    """
    findings: dict[str, list[ErrorDetails]] = {}
    for finding in error.errors(include_url=False):
        key = ".".join([*([where] if where else []), *_path(finding["loc"], model)])
        findings.setdefault(key, []).append(finding)
    unknown = {
        key: _unknown(key, where, model, elsewhere)
        for key, found in findings.items()
        if found[0]["type"] == "extra_forbidden"
    }
    lines = [f"{key}: unknown key; {remedy}" for key, remedy in unknown.items()]
    for key, found in findings.items():
        section, _, name = key.rpartition(".")
        is_misspelled = found[0]["type"] == "missing" and any(
            other.rpartition(".")[0] == section and remedy == f"did you mean {name}?"
            for other, remedy in unknown.items()
        )
        is_less_specific = any(other.startswith(f"{key}.") for other in findings)
        if key not in unknown and not is_misspelled and not is_less_specific:
            lines += _said(key, found)
    return lines


def _said(key: str, found: Sequence[ErrorDetails]) -> list[str]:
    """Lines on the value at ``key``: one for the forms of which none fits, one for each thing that does not agree."""
    first = found[0]
    if first["type"] == "missing":
        return [f"{key} is required and missing"]
    messages = [_KEYS_WANTED.get(finding["type"], finding["msg"].removeprefix("Value error, ")) for finding in found]
    if first["type"] == "value_error" and isinstance(first["input"], dict):
        return [f"{key}: {message}" if key else message for message in messages[0].split("\n")]
    value = json.dumps(redacted_at(key, first["input"]), default=str)
    lowered = [message[0].lower() + message[1:] for message in messages]
    alternatives = " or ".join([lowered[0], *(message.removeprefix("input should be ") for message in lowered[1:])])
    return [f"{key} is {value if len(value) < 80 else value[:77] + '...'}: {alternatives}"]


_KEYS_WANTED = dict.fromkeys(
    ("model_type", "dict_type"), "input should be keys, each with a colon and a space after it"
)
"""What to say instead of pydantic's words of objects."""
_FORM = re.compile(r"(dict|list|tuple)\[.*\]|\[key\]|constrained-\w+|str|int|float")
"""Names in pydantic's ``loc`` of the forms that a value in a free mapping may have."""


def _path(loc: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    """Keys of a recipe in pydantic's ``loc``, which also names the forms that a value may have."""
    path: list[str] = []
    inside: type[BaseModel] | None = model
    is_free = False
    for index, part in enumerate(loc):
        field = inside.model_fields.get(str(part)) if inside is not None else None
        if field is not None:
            inside = model_in(field.annotation)
            is_free = any(get_origin(leaf) is dict for leaf in flatten(field.annotation))
        elif is_free and _FORM.fullmatch(str(part)):
            continue
        elif not isinstance(part, int) and not is_free:
            is_unknown_key = inside is not None and index == len(loc) - 1 and not part.startswith("tagged-")
            if not is_unknown_key:
                continue
        path.append(str(part))
    return path


def _unknown(key: str, where: str, model: type[BaseModel], elsewhere: Iterable[str]) -> str:
    """The remedy for a key that ``model``, which stands at ``where``, does not know: keys that may be meant."""
    inside, _, name = key.rpartition(".")
    place = inside.removeprefix(where).removeprefix(".")
    here = _known_keys(model, place.split(".") if place else [])
    if not difflib.get_close_matches(name, here, n=1, cutoff=0.85):
        prefix = f"{where}." if where else ""
        others = {*elsewhere, *keys_of(model, prefix)} - {key}
        names = {other.rpartition(".")[2] for other in others}
        cutoff = 1.0 if close_to(name, here) is not None else 0.8
        meant = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
        found = sorted(
            (_distance(inside, other), other) for other in others if meant and other.endswith(f".{meant[0]}")
        )
        if found:
            nearest = [other for distance, other in found if distance == found[0][0]]
            return f"did you mean {' or '.join(nearest[:3])}?"
    return did_you_mean(name, here)


def _distance(inside: str, key: str) -> int:
    """Sections to leave and to enter on the way from the section ``inside`` to that of ``key``."""
    here, there = (inside.split(".") if inside else []), key.split(".")[:-1]
    shared = len(os.path.commonprefix([here, there]))
    return len(here) + len(there) - 2 * shared


def keys_of(model: type[BaseModel], where: str = "") -> Iterator[str]:
    """Dotted keys of the options of ``model`` and of the sections in it; ``0`` stands for an entry of a list."""
    for name, field in model.model_fields.items():
        yield f"{where}{field.alias or name}"
        inner = model_in(field.annotation)
        if inner is not None:
            is_list = any(get_origin(leaf) is tuple for leaf in flatten(field.annotation))
            yield from keys_of(inner, f"{where}{name}.0." if is_list else f"{where}{name}.")


def _known_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    """Names that the (nested) model at ``path`` accepts."""
    for part in path:
        field = model.model_fields.get(part)
        model = model_in(field.annotation if field else None) or model
    return [field.alias or name for name, field in model.model_fields.items()]
