"""Recipes as YAML: packaged ones and files, what they extend, overrides and ${variables}."""

from __future__ import annotations

import importlib.resources
import json
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from raydfkd.config.recipe import Recipe
from raydfkd.config.registry import explain
from raydfkd.config.schema import TeacherSpec, TransferSetSpec
from raydfkd.errors import RecipeError, did_you_mean


def packaged_recipes() -> list[str]:
    """Names of the recipes that come with raydfkd."""
    folder = importlib.resources.files("raydfkd") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(source: str | Path, overrides: tuple[str, ...] | list[str] = (), run_dir: str | None = None) -> Recipe:
    """Read a recipe from a file or by the name of a packaged one.

    A recipe may start from another: ``recipe: NAME`` takes everything from that one and replaces what is given.
    ``overrides`` are ``a.b.c=value`` with YAML values; an entry of a list is addressed by its name or position.

    Raises:
        RecipeError: with the key, its value and what would be right.
    """
    data = _read(str(source), seen=())
    for override in overrides:
        _override(data, override)
    if run_dir is not None:
        data["run_dir"] = run_dir
    _expand(data)
    try:
        return Recipe.model_validate_json(json.dumps(data))
    except TypeError as error:
        raise RecipeError(f"{source} has a value that is not plain data: {error}") from None
    except ValidationError as error:
        raise RecipeError(explain(error, "", Recipe)) from None


def _read(source: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if source in seen:
        raise RecipeError(f"recipe: {' -> '.join((*seen, source))} goes in a circle; name another base")
    path = Path(source)
    if path.is_file():
        text = _text(path)
    elif source in packaged_recipes():
        text = (importlib.resources.files("raydfkd") / "recipes" / f"{source}.yaml").read_text()
    elif path.suffix in (".yaml", ".yml") or "/" in source:
        raise RecipeError(f"{source}: no such file; give a recipe file or one of: {', '.join(packaged_recipes())}")
    else:
        raise RecipeError(f"{source}: no such recipe; {did_you_mean(source, packaged_recipes())}")
    try:
        data = yaml.load(text, _Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{source} is not a recipe: the top of the file must be keys like `teacher:`")
    base = data.pop("recipe", None)
    if base is None:
        return data
    beside = path.parent / str(base)
    return _merge(_read(str(beside if beside.is_file() else base), (*seen, source)), data)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise RecipeError(f"{path} cannot be read as a recipe: {reason}") from None


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` in it: mappings merge, everything else is replaced.

    A mapping that names another plug-in replaces the old one whole, whose options would not suit it; another network
    has none of the old one's options.
    """
    if any(base.get(key, name) != name for key, name in changes.items() if key in ("kind", "synthesizer")):
        return changes
    merged = dict(base)
    if base.get("network") != changes.get("network", base.get("network")):
        merged.pop("options", None)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _override(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set {override}: write it as key=value, such as seed=1")
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError:
        raise RecipeError(f"--set {override}: {text!r} is not a YAML value; quote it") from None
    place: Any = data
    parts = path.split(".")
    for depth, part in enumerate(parts):
        key: Any = part
        if isinstance(place, list):
            names = [_entry_name(entry, index) for index, entry in enumerate(place)]
            if part.isdigit() and int(part) < len(place):
                key = int(part)
            elif part in names:
                key = names.index(part)
            else:
                where = ".".join(parts[:depth])
                raise RecipeError(f"--set {override}: {where} has no entry {part!r}; {did_you_mean(part, names)}")
            if isinstance(place[key], str) and depth < len(parts) - 1:
                place[key] = {"term" if "objective" in parts[:depth] else "kind": place[key]}
        elif not isinstance(place, dict):
            raise RecipeError(f"--set {override}: {'.'.join(parts[:depth])} is {place!r}, which has no keys inside")
        if depth == len(parts) - 1:
            place[key] = value
        elif isinstance(place, dict):
            place = place.setdefault(key, {})
        else:
            place = place[key]


def _entry_name(entry: Any, index: int) -> str:
    if isinstance(entry, dict):
        return str(entry.get("name") or entry.get("term") or entry.get("kind") or index)
    return str(entry)


def _expand(data: dict[str, Any]) -> None:
    """Put the run's name and folder where ``${name}`` and ``${run_dir}`` stand."""
    values = {"name": str(data.get("name", ""))}
    run_dir = data.get("run_dir", Recipe.model_fields["run_dir"].default)
    values["run_dir"] = str(run_dir).replace("${name}", values["name"]).rstrip("/")

    def expand(value: Any, where: str) -> Any:
        if isinstance(value, dict):
            return {key: expand(inner, f"{where}.{key}".lstrip(".")) for key, inner in value.items()}
        if isinstance(value, list):
            return [expand(inner, f"{where}.{index}") for index, inner in enumerate(value)]
        if not isinstance(value, str):
            return value
        for name in re.findall(r"\$\{(\w+)\}", value):
            if name not in values:
                raise RecipeError(f"{where} is {value!r}: unknown placeholder; {did_you_mean(name, values)}")
            value = value.replace(f"${{{name}}}", values[name])
        return value

    data["run_dir"] = values["run_dir"]
    for section, key in (("teacher", "weights"), ("transfer_set", "uri")):
        model = TeacherSpec if section == "teacher" else TransferSetSpec
        if isinstance(data.get(section), dict):
            data[section].setdefault(key, model.model_fields[key].default)
    data.update(expand(data, ""))


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number, a date is text and a key given twice is an error."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise RecipeError(f"{key.value}: given twice, again in line {line}; keep one of them")
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
