"""What `raydfkd show` prints: recipes, jobs, sections of a recipe and plug-ins with their options and meanings."""

from __future__ import annotations

import importlib.resources
import textwrap
from collections.abc import Iterator
from typing import Any

from raydfkd.config.families import BESIDE, REGISTRIES, family
from raydfkd.config.load import packaged_recipes
from raydfkd.config.registry import Registry
from raydfkd.errors import RecipeError, did_you_mean


def show(name: str | None) -> Iterator[str]:
    """Lines that explain everything, a family, a plug-in or a recipe.

    Raises:
        RecipeError: no such name.
    """
    if name in packaged_recipes():
        yield _recipe_text(str(name)).rstrip()
        return
    if name is None or name == "recipes":
        yield "recipes"
        for recipe in packaged_recipes():
            yield f"  {recipe:28} {_recipe_text(recipe).partition(chr(10))[0].lstrip('# ')}"
        if name is not None:
            return
    chosen = [key for key in REGISTRIES if name in (None, key)]
    if chosen:
        for key in chosen:
            yield from ("", key) if name is None else (key,)
            for plugin in family(key).names():
                yield from _plugin(family(key), plugin)
            for form, meaning in BESIDE[key]:
                yield f"  {form:28} {meaning}"
        return
    found = [key for key in REGISTRIES if name in family(key).names()]
    if not found:
        known = [
            *packaged_recipes(),
            "recipes",
            *REGISTRIES,
            *(plugin for key in REGISTRIES for plugin in family(key).names()),
        ]
        raise RecipeError(f"there is nothing called {name!r}; {did_you_mean(str(name), known)}")
    for key in found:
        yield from _plugin(family(key), str(name), whole=True)


def _plugin(registry: Registry[Any], name: str, *, whole: bool = False) -> Iterator[str]:
    doc, options = registry.describe(name)
    first, _, rest = doc.partition("\n")
    yield f"  {name:28} {first}"
    if whole and rest.strip():
        yield textwrap.indent(rest.strip("\n"), "    ")
    for option in options:
        yield f"    {option.name:26} {option.meaning} [{option.type}, default {option.default}]"


def _recipe_text(name: str) -> str:
    return (importlib.resources.files("raydfkd") / "recipes" / f"{name}.yaml").read_text()
