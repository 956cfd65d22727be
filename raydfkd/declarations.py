"""Plug-ins as their source declares them, for checks that answer before torch could be imported.

Plug-ins are found by their ``@REGISTRY.register("name")`` and options by the constructor's signature; of a plug-in's
module nothing is executed but the annotations and defaults of options, and what these are made of.
"""

from __future__ import annotations

import ast
import importlib
import importlib.abc
import importlib.util
from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic import BaseModel

from raydfkd.registry import Declaration, Family, Option

IMPORTABLE = ("collections.abc", "pydantic", "raydfkd.sections", "typing")
"""Modules that annotations and defaults of options may import from: quick, and free of torch."""

Factory = ast.ClassDef | ast.FunctionDef


class DeclaredFamily(Family):
    """What the registry ``variable`` of ``module`` will hold once everything is imported."""

    def __init__(self, module: str, variable: str) -> None:
        family, modules = _source(module).registry(variable)
        super().__init__(family)
        self._factories = {
            name: (source, factory)
            for source in map(_source, (module, *modules))
            for name, factory in source.registered(variable)
        }

    def names(self) -> list[str]:
        """Every declared name, sorted."""
        return sorted(self._factories)

    def declaration(self, name: str) -> Declaration:
        """See the base class; read from the source."""
        source, factory = self._factories[name]
        signature = _signature(factory)
        options = () if signature is None else map(source.option, signature.kwonlyargs, signature.kw_defaults)
        return Declaration(doc=ast.get_docstring(factory) or "", options=tuple(options))


def _signature(factory: Factory) -> ast.arguments | None:
    if isinstance(factory, ast.FunctionDef):
        return factory.args
    methods = (statement for statement in factory.body if isinstance(statement, ast.FunctionDef))
    return next((method.args for method in methods if method.name == "__init__"), None)


class _Source:
    """The source of a module, of which single names can be evaluated."""

    def __init__(self, module: str) -> None:
        spec = importlib.util.find_spec(module)
        assert spec is not None, f"{module} is part of the package"
        assert isinstance(spec.loader, importlib.abc.InspectLoader), f"{module} comes with its source"
        self._module = module
        self._body = ast.parse(spec.loader.get_source(module) or "").body
        self._bound = {name: statement for statement in self._body for name in _names_bound_by(statement)}
        self._values: dict[str, Any] = {}

    def registry(self, variable: str) -> tuple[str, list[str]]:
        """The arguments with which the registry ``variable`` is made: its family and modules."""
        statement = self._bound[variable]
        assert isinstance(statement, ast.AnnAssign), f"{variable} has a type"
        assert isinstance(statement.value, ast.Call), f"{variable} is made where it is declared"
        family, modules = map(ast.literal_eval, statement.value.args)
        return family, modules

    def registered(self, variable: str) -> Iterator[tuple[str, Factory]]:
        """Names and definitions of what is decorated with ``@variable.register(name)``."""
        for statement in self._body:
            if not isinstance(statement, Factory):
                continue
            for decorator in statement.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == f"{variable}.register":
                    yield ast.literal_eval(decorator.args[0]), statement

    def option(self, argument: ast.arg, default: ast.expr | None) -> Option:
        """A keyword-only argument as an option."""
        assert argument.annotation is not None, f"option {argument.arg} in {self._module} has an annotation"
        return Option(
            name=argument.arg,
            annotation=self._evaluated(argument.annotation),
            written=ast.unparse(argument.annotation),
            default=... if default is None else self._evaluated(default),
        )

    def value(self, name: str) -> Any:
        """What the module would bind ``name`` to."""
        if name not in self._values:
            statement = self._bound[name]
            if isinstance(statement, ast.ImportFrom):
                original = next(alias.name for alias in statement.names if name in (alias.asname, alias.name))
                self._values[name] = self._imported(str(statement.module), original)
            else:
                self._values[name] = self._defined(statement, name)
        return self._values[name]

    def _imported(self, module: str, name: str) -> Any:
        if module in IMPORTABLE:
            return getattr(importlib.import_module(module), name)
        assert module.startswith("raydfkd."), (
            f"{self._module} has an option of {module}.{name}, but its type must come from {', '.join(IMPORTABLE)}"
        )
        return _source(module).value(name)

    def _defined(self, statement: ast.stmt, name: str) -> Any:
        assert isinstance(statement, ast.Assign | ast.AnnAssign | ast.ClassDef), (
            f"{self._module} has an option of {name}, but its type must be a class or an alias"
        )
        namespace = self._namespace(statement, but=name)
        # Annotations stay postponed, as they are in this module: a class may name itself in its methods.
        exec(compile(ast.Module([statement], []), self._module, "exec"), namespace)
        defined = namespace[name]
        if isinstance(defined, type) and issubclass(defined, BaseModel):
            defined.model_rebuild(_types_namespace=namespace)  # pydantic would look for the names in the module
        return defined

    def _evaluated(self, expression: ast.expr) -> Any:
        return eval(compile(ast.Expression(expression), self._module, "eval"), self._namespace(expression))

    def _namespace(self, node: ast.AST, *, but: str = "") -> dict[str, Any]:
        """What ``node`` needs of the module, evaluated."""
        names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)} & self._bound.keys() - {but}
        return {"__name__": self._module} | {name: self.value(name) for name in names}


_source = cache(_Source)


def _names_bound_by(statement: ast.stmt) -> list[str]:
    match statement:
        case ast.ImportFrom(names=aliases) | ast.Import(names=aliases):
            return [alias.asname or alias.name for alias in aliases]
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
    return []
