"""Finds mistakes in a recipe without the code and files that it names: names and options of plug-ins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from raydfkd.config.families import family
from raydfkd.config.recipe import Recipe
from raydfkd.config.registry import Chosen, chosen_in, keys_of
from raydfkd.config.schema import TermSpec
from raydfkd.errors import Mistakes


def static_check(recipe: Recipe) -> None:
    """Find unknown names and unfit options of the plug-ins that come with raydfkd; imports torch.

    Mistakes that take more than the recipe to find are left to ``runner.check``: whether parts suit each other, rules
    in constructors, everything given as ``module:Class``, networks given as ``torchvision:NAME``, files and devices.

    Raises:
        RecipeError: with key, value and remedy, a line for each plug-in with a mistake.
    """
    mistakes = Mistakes()
    elsewhere = tuple(keys_of(Recipe))
    for chosen in plugins_of(recipe):
        with mistakes.gathered():
            _check(chosen, elsewhere)
    mistakes.complain()


def plugins_of(recipe: Recipe) -> Iterator[Chosen]:
    """Every plug-in that the recipe chooses, but for those inside others."""
    synthesis = recipe.synthesis
    yield _network(recipe.teacher.network, recipe.teacher.options, "teacher")
    yield from _terms(synthesis.objective, "synthesis")
    for place, beside in enumerate(synthesis.beside):
        yield from _terms(beside.objective, f"synthesis.beside[{place}]")
    yield Chosen(family="synthesizers", name=synthesis.synthesizer, options=synthesis.options, where="synthesis")
    yield from chosen_in(type(recipe), dict(recipe), "")
    yield _network(recipe.student.network, recipe.student.options, "student")
    if recipe.verifier is not None:
        yield _network(recipe.verifier.network, recipe.verifier.options, "verifier")


def _terms(objective: Sequence[TermSpec], where: str) -> Iterator[Chosen]:
    for index, term in enumerate(objective):
        yield Chosen(family="terms", name=term.term, options=term.options, where=f"{where}.objective[{index}]")


def _network(name: str, options: dict[str, object], role: str) -> Chosen:
    return Chosen(family="networks", name=name, options=options, where=f"{role}.network")


def _check(chosen: Chosen, elsewhere: tuple[str, ...]) -> None:
    registry, where = family(chosen.family), chosen.where
    if registry.is_own(chosen.name):  # or a network of a package
        return
    registry.get(chosen.name, where=where)
    if chosen.family == "networks":
        where = where.replace(".network", ".options")
    beside = (*elsewhere, *(f"{where}.{option}" for option in registry.options(chosen.name)))
    for inner in registry.nested(chosen.name, chosen.options, where=where, elsewhere=elsewhere):
        _check(inner, beside)
