"""What `raydfkd show` lists: recipes and plug-ins with their options and meanings."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator
from functools import cache

from raydfkd.declarations import DeclaredFamily
from raydfkd.loading import packaged_recipes
from raydfkd.registry import Family, RecipeError, did_you_mean

REGISTRIES = {
    "synthesizers": "raydfkd.synthesis.synthesizer:SYNTHESIZERS",
    "terms": "raydfkd.losses.objective:TERMS",
    "targets": "raydfkd.synthesis.targets:TARGETS",
    "augmentations": "raydfkd.synthesis.augment:AUGMENTATIONS",
    "criteria": "raydfkd.distill.criteria:CRITERIA",
    "networks": "raydfkd.networks:NETWORKS",
    "generators": "raydfkd.generators:GENERATORS",
    "real_data": "raydfkd.real_data:REAL_DATA",
}
"""Where each family of plug-ins has its registry."""
BESIDE = {
    "networks": (
        ("torchvision:NAME", "A classification network of torchvision."),
        (
            "module:callable",
            "Code of yours, which runs; `raydfkd check --no-code` looks at a recipe without it.",
        ),
    )
}
"""What a family takes beside the names in its registry."""


@cache
def declared(family: str) -> DeclaredFamily:
    """One of :data:`REGISTRIES` as the source declares it, without importing the plug-ins."""
    module, _, variable = REGISTRIES[family].partition(":")
    return DeclaredFamily(module, variable)


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
    chosen = [family for family in REGISTRIES if name in (None, family)]
    if chosen:
        for family in chosen:
            yield from ("", family) if name is None else (family,)
            for plugin in declared(family).names():
                yield from _plugin(declared(family), plugin)
            for form, meaning in BESIDE.get(family, ()):
                yield f"  {form:28} {meaning}"
        return
    families = [declared(family) for family in REGISTRIES]
    found = [family for family in families if name in family.names()]
    if not found:
        known = [*packaged_recipes(), "recipes", *REGISTRIES, *(name for family in families for name in family.names())]
        raise RecipeError(f"there is nothing called {name!r}; {did_you_mean(str(name), known)}")
    for registered in found:
        yield from _plugin(registered, str(name))


def _plugin(family: Family, name: str) -> Iterator[str]:
    meaning, options = family.describe(name)
    yield f"  {name:28} {meaning}"
    for option in options:
        yield f"    {option.name:26} {option.meaning} [{option.type}, default {option.default}]"


def _recipe_text(name: str) -> str:
    return (importlib.resources.files("raydfkd") / "recipes" / f"{name}.yaml").read_text()
