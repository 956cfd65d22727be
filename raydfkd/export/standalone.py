"""Source text of definitions of ours, alone: with everything that they use of their modules, and nothing of raydfkd."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, get_args


def standalone_source(*members: Callable[..., Any]) -> tuple[list[str], list[str]]:
    """The imports that ``members`` need, and the source of each of them and of all that they use of their modules.

    They lose the decorators that register them, and an alias of raydfkd's that narrows a type becomes that type.
    """
    imports: dict[str, None] = {}
    definitions: list[str] = []
    for name in dict.fromkeys(member.__module__ for member in members):
        module = sys.modules[name]
        source = inspect.getsource(module)
        statements = [_unregistered(node) for node in ast.parse(source).body]
        needed = _needed({member.__name__ for member in members if member.__module__ == name}, statements)
        imports.update(dict.fromkeys(line for node in statements for line in _imports(node, needed, module)))
        definitions += [_text(node, source) for node in statements if _defined(node) & needed]
    return list(imports), definitions


def _unregistered(node: ast.stmt) -> ast.stmt:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        node.decorator_list = [
            decorator
            for decorator in node.decorator_list
            if not (isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith(".register"))
        ]
    return node


def _needed(names: set[str], statements: list[ast.stmt]) -> set[str]:
    """The ``names``, those that their definitions use, those that these use, and so on."""
    used = {name: _used(node) for node in statements for name in _defined(node)}
    needed, new = set(names), set(names)
    while new:
        new = {other for name in new for other in used.get(name, ())} - needed
        needed |= new
    return needed


def _defined(node: ast.stmt) -> set[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
    return set()


def _used(node: ast.stmt) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def _imports(node: ast.stmt, needed: set[str], module: ModuleType) -> Iterator[str]:
    """The lines for those names of an import that are needed."""
    if not isinstance(node, ast.Import | ast.ImportFrom) or getattr(node, "module", None) == "__future__":
        return
    node.names = [alias for alias in node.names if (alias.asname or alias.name.partition(".")[0]) in needed]
    if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "raydfkd":
        yield from (f"{alias.name} = {get_args(getattr(module, alias.name))[0].__name__}" for alias in node.names)
    elif node.names:
        yield ast.unparse(node)


def _text(node: ast.stmt, source: str) -> str:
    """A definition as it is written, comments included, with the decorators that are left."""
    decorators = [f"@{ast.unparse(decorator)}" for decorator in getattr(node, "decorator_list", ())]
    return "\n".join([*decorators, *source.splitlines()[node.lineno - 1 : node.end_lineno]])
