"""Names in a recipe become objects here, with errors that say what would have been right."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import re
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
class OptionDoc:
    """One option of a plug-in, as ``raydfkd show`` prints it."""

    name: str
    type: str
    default: str
    meaning: str


class Registry(Generic[T]):
    """A family of plug-ins by name.

    A plug-in's *options* are the keyword-only arguments of its constructor and come from the recipe, checked against
    their annotations; its positional arguments are what the engine supplies. ``modules`` register their plug-ins
    when they are first needed, so that importing the command line does not import torch.
    """

    def __init__(self, family: str, modules: Iterable[str]) -> None:
        self.family = family
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
        if name not in self.names():
            raise RecipeError(f"{where}: unknown {self.family} {name!r}; {did_you_mean(name, self._factories)}")
        return self._factories[name]

    def build(self, name: str, options: Mapping[str, Any], *supplied: Any, where: str) -> T:
        """Construct the plug-in ``name`` from engine-``supplied`` arguments and recipe ``options``.

        Raises:
            RecipeError: unknown name or option, or an option of the wrong type.
        """
        factory = self.get(name, where=where)
        checked = self.check(name, options, where=where)
        try:
            return factory(*supplied, **checked)
        except RecipeError:
            raise
        except ValueError as error:
            raise RecipeError(f"{where}: {error}") from error

    def check(self, name: str, options: Mapping[str, Any], *, where: str) -> dict[str, Any]:
        """Validate ``options`` against the constructor's annotations without constructing anything."""
        model = _options_model(self.get(name, where=where))
        try:
            value = model.model_validate_json(json.dumps(options), strict=True)
        except ValidationError as error:
            raise RecipeError(explain(error, where, model)) from None
        return {field: getattr(value, field) for field in model.model_fields}

    def describe(self, name: str) -> tuple[str, list[OptionDoc]]:
        """One line of meaning and the options of plug-in ``name``."""
        factory = self.get(name, where=self.family)
        doc = inspect.getdoc(factory) or ""
        meanings = dict(re.findall(r"^    (\w+): (.+)$", doc.partition("Args:")[2], flags=re.MULTILINE))
        options = [
            OptionDoc(
                name=parameter.name,
                type=str(parameter.annotation),
                default="required"
                if parameter.default is parameter.empty
                else json.dumps(parameter.default, default=_plain),
                meaning=meanings.get(parameter.name, ""),
            )
            for parameter in _option_parameters(factory)
        ]
        return doc.partition("\n")[0], options


def _plain(value: BaseModel) -> Any:
    return value.model_dump(mode="json")


def _option_parameters(factory: Callable[..., Any]) -> list[inspect.Parameter]:
    parameters = inspect.signature(factory).parameters.values()
    return [parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def _options_model(factory: Callable[..., Any]) -> type[BaseModel]:
    initializer = factory.__init__ if inspect.isclass(factory) else factory
    namespace = getattr(initializer, "__globals__", {})
    fields: dict[str, Any] = {}
    for parameter in _option_parameters(factory):
        annotation = parameter.annotation
        if isinstance(annotation, str):
            annotation = eval(annotation, namespace)  # noqa: S307 - our own source's annotation, not user input
        fields[parameter.name] = (annotation, ... if parameter.default is parameter.empty else parameter.default)
    return create_model("Options", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)


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
