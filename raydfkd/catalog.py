"""What `raydfkd show` lists: recipes and plug-ins with their options and meanings."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator
from typing import Any

from raydfkd.distill.criteria import CRITERIA
from raydfkd.generators import GENERATORS
from raydfkd.losses.objective import TERMS
from raydfkd.networks import NETWORKS
from raydfkd.real_data import REAL_DATA
from raydfkd.recipe import packaged_recipes
from raydfkd.registry import RecipeError, Registry, did_you_mean
from raydfkd.synthesis.augment import AUGMENTATIONS
from raydfkd.synthesis.synthesizer import SYNTHESIZERS
from raydfkd.synthesis.targets import TARGETS

FAMILIES: dict[str, Registry[Any]] = {
    "synthesizers": SYNTHESIZERS,
    "terms": TERMS,
    "targets": TARGETS,
    "augmentations": AUGMENTATIONS,
    "criteria": CRITERIA,
    "networks": NETWORKS,
    "generators": GENERATORS,
    "real_data": REAL_DATA,
}


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
    chosen = [family for family in FAMILIES if name in (None, family)]
    if chosen:
        for family in chosen:
            yield from ("", family) if name is None else (family,)
            for plugin in FAMILIES[family].names():
                yield from _plugin(FAMILIES[family], plugin)
        return
    found = [registry for registry in FAMILIES.values() if name in registry.names()]
    if not found:
        known = [*packaged_recipes(), "recipes", *FAMILIES, *(n for r in FAMILIES.values() for n in r.names())]
        raise RecipeError(f"there is nothing called {name!r}; {did_you_mean(str(name), known)}")
    for registry in found:
        yield from _plugin(registry, str(name))


def _plugin(registry: Registry[Any], name: str) -> Iterator[str]:
    meaning, options = registry.describe(name)
    yield f"  {name:28} {meaning}"
    for option in options:
        yield f"    {option.name:26} {option.meaning} [{option.type}, default {option.default}]"


def _recipe_text(name: str) -> str:
    return (importlib.resources.files("raydfkd") / "recipes" / f"{name}.yaml").read_text()
