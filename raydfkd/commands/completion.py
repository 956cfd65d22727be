"""Completions of the shell: recipes, keys of `--set` with their values, names that `show` explains. Without torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from raydfkd.config.describe import OptionDoc, keyed_options, sections_in
from raydfkd.config.families import REGISTRIES
from raydfkd.config.load import packaged_jobs, packaged_methods, packaged_recipes
from raydfkd.config.recipe import Recipe

PACKAGE = Path(__file__).parents[1]


def complete_recipe(incomplete: str) -> list[str]:
    """Packaged recipes and jobs, and recipe files with the folders on the way to them."""
    found = [*packaged_recipes(), *packaged_jobs(), *_files(incomplete)]
    return [name for name in found if name.startswith(incomplete)]


def complete_override(incomplete: str) -> list[str]:
    """Keys of the schema with an equals sign; after that the values that a closed choice has."""
    key, equals, _ = incomplete.partition("=")
    options = _options()
    if not equals:
        return [f"{known}=" for known in options if known.startswith(incomplete)]
    values = _values(options[key]) if key in options else []
    return [f"{key}={value}" for value in values if f"{key}={value}".startswith(incomplete)]


def complete_name(incomplete: str) -> list[str]:
    """Everything that `raydfkd show` explains but for options of plug-ins."""
    options = _options()
    sections = ["recipe", *dict(sections_in(Recipe))]
    packaged = [*packaged_recipes(), *packaged_methods(), *packaged_jobs()]
    groups = ["recipes", "methods", "jobs", *packaged, *REGISTRIES]
    values = [value for option in options.values() for value in option.choices]
    names = dict.fromkeys([*groups, *sections, *plugin_names(), *options, *values])
    return [name for name in names if name.startswith(incomplete)]


def plugin_names() -> list[str]:
    """Names of the plug-ins that come with raydfkd, read where they are registered: importing them takes seconds."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py")))
    return sorted(set(re.findall(r'^@[A-Z_]+\.register\("([\w.-]+)"\)', text, flags=re.MULTILINE)))


def _options() -> dict[str, OptionDoc]:
    """Every option that `--set` takes by its dotted key alone: no sections, and no terms, which are in a list."""
    sections = dict(sections_in(Recipe))
    return {
        key: option
        for key, option in keyed_options(Recipe).items()
        if key not in sections and not key.startswith("synthesis.objective.")
    }


def _values(option: OptionDoc) -> list[str]:
    if option.choices:
        return list(option.choices)
    if option.type.startswith("true or false"):
        return ["true", "false"]
    default = option.default
    return [json.loads(default) if default.startswith('"') else default] if default != "required" else []


def _files(incomplete: str) -> Iterator[str]:
    folder, name = incomplete.rpartition("/")[::2]
    inside = f"{folder}/" if "/" in incomplete else ""
    place = Path(inside or ".").expanduser()
    try:
        entries = sorted(place.iterdir())
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith(name) and (name or not entry.name.startswith(".")):
            if entry.is_dir():
                yield f"{inside}{entry.name}/"
            elif entry.suffix in (".yaml", ".yml"):
                yield f"{inside}{entry.name}"
