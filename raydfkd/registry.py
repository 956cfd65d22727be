"""Names in a recipe become objects here, with errors that say what would have been right."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

T = TypeVar("T")


class RecipeError(ValueError):
    """A mistake of the user's, found before work begins; the message names key, value and remedy in one line."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Say which of ``known`` the user probably meant, or list them all."""
    options = sorted(known)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    return f"known: {', '.join(options)}" if options else "there are none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A keyword-only argument of a plug-in's constructor."""

    name: str
    annotation: Any
    """Its type, evaluated."""
    written: str
    """Its type as the source has it."""
    default: Any
    """``...`` where the recipe has to say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """What a plug-in says of itself, whether it was imported or its source was read."""

    doc: str
    options: tuple[Option, ...]

    def model(self) -> type[BaseModel]:
        """What options in a recipe are validated with."""
        fields: dict[str, Any] = {option.name: (option.annotation, option.default) for option in self.options}
        return create_model("Options", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionDoc:
    """One option of a plug-in, as ``raydfkd show`` prints it."""

    name: str
    type: str
    default: str
    meaning: str


class Family(ABC):
    """A family of plug-ins as a recipe sees it: names, options and meanings.

    What a recipe may say is decided here, once; subclasses find the declarations, among what is imported
    (:class:`Registry`) or in the source (:class:`raydfkd.declarations.DeclaredFamily`).
    """

    def __init__(self, family: str) -> None:
        self.family = family

    @abstractmethod
    def names(self) -> list[str]:
        """Every name of the family, sorted."""

    @abstractmethod
    def declaration(self, name: str) -> Declaration:
        """What the plug-in of that name, which is one of :meth:`names`, says of itself."""

    def require(self, name: str, *, where: str) -> None:
        """Refuse a name that the family does not have; ``where`` is the recipe key to blame."""
        if name not in self.names():
            raise RecipeError(f"{where}: unknown {self.family} {name!r}; {did_you_mean(name, self.names())}")

    def check(self, name: str, options: Mapping[str, Any], *, where: str) -> dict[str, Any]:
        """Validate ``options`` against the constructor's annotations without constructing anything.

        Raises:
            RecipeError: unknown name or option, or an option of the wrong type or out of its range.
        """
        self.require(name, where=where)
        model = self.declaration(name).model()
        try:
            value = model.model_validate_json(json.dumps(options), strict=True)
        except ValidationError as error:
            raise RecipeError(explain(error, where, model)) from None
        return {field: getattr(value, field) for field in model.model_fields}

    def describe(self, name: str) -> tuple[str, list[OptionDoc]]:
        """One line of meaning and the options of plug-in ``name``."""
        self.require(name, where=self.family)
        declared = self.declaration(name)
        meanings = dict(re.findall(r"^    (\w+): (.+)$", declared.doc.partition("Args:")[2], flags=re.MULTILINE))
        options = [
            OptionDoc(
                name=option.name,
                type=option.written,
                default="required" if option.default is ... else json.dumps(option.default, default=_plain),
                meaning=meanings.get(option.name, ""),
            )
            for option in declared.options
        ]
        return declared.doc.partition("\n")[0], options


def _plain(value: BaseModel) -> Any:
    return value.model_dump(mode="json")


class Registry(Family, Generic[T]):
    """A family of plug-ins that registers them, and builds them from a recipe.

    A plug-in's *options* are the keyword-only arguments of its constructor and come from the recipe, checked against
    their annotations; its positional arguments are what the engine supplies. ``modules`` register their plug-ins
    when they are first needed. Annotations and defaults of options are also read without importing the plug-in, so
    they use names of :data:`raydfkd.declarations.IMPORTABLE` and classes and aliases of the package made of those.
    """

    def __init__(self, family: str, modules: Iterable[str]) -> None:
        super().__init__(family)
        self._modules = tuple(modules)
        self._factories: dict[str, Callable[..., T]] = {}

    def register(self, name: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
        """Make a class or function known under ``name``; a name can be taken once."""

        def add(factory: Callable[..., T]) -> Callable[..., T]:
            assert name not in self._factories, f"{self.family} {name} is registered twice"
            self._factories[name] = factory
            return factory

        return add

    def names(self) -> list[str]:
        """Every registered name, sorted."""
        for module in self._modules:
            importlib.import_module(module)
        return sorted(self._factories)

    def get(self, name: str, *, where: str) -> Callable[..., T]:
        """Look ``name`` up; ``where`` is the recipe key to blame."""
        self.require(name, where=where)
        return self._factories[name]

    def build(self, name: str, options: Mapping[str, Any], *supplied: Any, where: str) -> T:
        """Construct the plug-in ``name`` from engine-``supplied`` arguments and recipe ``options``.

        Raises:
            RecipeError: what :meth:`check` finds, or the constructor's own complaint.
        """
        checked = self.check(name, options, where=where)
        try:
            return self._factories[name](*supplied, **checked)
        except RecipeError:
            raise
        except ValueError as error:
            raise RecipeError(f"{where}: {error}") from error

    def declaration(self, name: str) -> Declaration:
        """See the base class; read from the imported object."""
        factory = self._factories[name]
        initializer = factory.__init__ if inspect.isclass(factory) else factory
        namespace = getattr(initializer, "__globals__", {})
        options = [
            Option(
                name=parameter.name,
                annotation=_evaluated(parameter.annotation, namespace),
                written=str(parameter.annotation),
                default=... if parameter.default is parameter.empty else parameter.default,
            )
            for parameter in inspect.signature(factory).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY
        ]
        return Declaration(doc=inspect.getdoc(factory) or "", options=tuple(options))


def _evaluated(annotation: Any, namespace: dict[str, Any]) -> Any:
    return eval(annotation, namespace) if isinstance(annotation, str) else annotation


def explain(error: ValidationError, where: str, model: type[BaseModel]) -> str:
    """Put one finding of a pydantic ``error`` into a line with key, value and remedy.

    An unknown key goes first, because it is often a missing one misspelled.
    """
    findings = error.errors(include_url=False)
    finding = next((finding for finding in findings if finding["type"] == "extra_forbidden"), findings[0])
    path = [str(part) for part in finding["loc"] if not str(part).startswith(("function-", "tagged-", "literal["))]
    key = ".".join([*([where] if where else []), *path])
    if finding["type"] == "extra_forbidden":
        return f"{key}: unknown key; {did_you_mean(path[-1], _known_keys(model, path[:-1]))}"
    if finding["type"] == "missing":
        return f"{key} is required and missing"
    message = finding["msg"].removeprefix("Value error, ")
    if finding["type"] == "value_error" and isinstance(finding["input"], dict):
        return f"{key}: {message}" if key else message
    message = message[0].lower() + message[1:]
    value = json.dumps(finding["input"], default=str)
    return f"{key} is {value if len(value) < 80 else value[:77] + '...'}: {message}"


def _known_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    """Names that the (nested) model at ``path`` accepts."""
    for part in path:
        field = model.model_fields.get(part)
        inner = [
            candidate
            for candidate in _flatten(field.annotation if field else None)
            if inspect.isclass(candidate) and issubclass(candidate, BaseModel)
        ]
        if inner:
            model = inner[0]
    return list(model.model_fields)


def _flatten(annotation: Any) -> list[Any]:
    arguments = getattr(annotation, "__args__", ())
    return [annotation, *(leaf for argument in arguments for leaf in _flatten(argument))]
