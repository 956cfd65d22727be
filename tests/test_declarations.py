from __future__ import annotations

import sys

import pytest

from raydfkd.declarations import DeclaredFamily
from raydfkd.registry import OptionDoc, RecipeError

VEHICLES = '''
from __future__ import annotations
from typing import Literal as OneOf
import nosuchpackage
from pydantic import model_validator
from raydfkd.generators import StackForm
from raydfkd.sections import PluginSpec, Positive, Spec
from raydfkd.registry import Registry

VEHICLES: Registry[Vehicle] = Registry("vehicle", [])
Colour = OneOf["red", "blue"]
DOORS = 3

class Motor(Spec):
    power: Positive
    spare: Motor | None = None

    @model_validator(mode="after")
    def _strong(self) -> Motor:
        if self.power > 900:
            raise ValueError(f"power is {self.power}; use at most 900")
        return self

raise RuntimeError("the module is executed")

@VEHICLES.register("car")
class Car:
    """Drives on roads.

    Args:
        doors: ways in.
    """

    def drive(self, *, speed: Positive): ...

    def __init__(
        self,
        space: nosuchpackage.Space,
        *,
        motor: Motor,
        doors: Positive = DOORS,
        colour: Colour = "red",
        form: StackForm = "auto",
        generator: PluginSpec = PluginSpec(kind="conv"),
    ) -> None: ...

@VEHICLES.register("bicycle")
def bicycle(space, *, gears: int = 1) -> nosuchpackage.Vehicle:
    """Needs no fuel."""

@VEHICLES.register("cart")
class Cart:
    """Has no options."""

@VEHICLES.register("tank")
class Tank:
    """Has an option of a type that takes more than a recipe to know."""

    def __init__(self, *, armour: nosuchpackage.Armour) -> None: ...

@VEHICLES.register("ship")
class Ship:
    """Has an option of a type that is no type."""

    def __init__(self, *, name: bicycle) -> None: ...
'''


@pytest.fixture(scope="module")
def vehicles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    (folder / "users_vehicles.py").write_text(VEHICLES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        return DeclaredFamily("users_vehicles", "VEHICLES")


def refused(family, name, options):
    with pytest.raises(RecipeError) as error:
        family.check(name, options, where="trip")
    return str(error.value)


def test_names_are_read_without_executing_the_module(vehicles):
    assert (vehicles.family, vehicles.names()) == ("vehicle", ["bicycle", "car", "cart", "ship", "tank"])
    assert "users_vehicles" not in sys.modules


def test_options_are_the_keyword_only_arguments_of_the_constructor_alone(vehicles):
    meaning, options = vehicles.describe("car")
    assert meaning == "Drives on roads."
    assert [option.name for option in options] == ["motor", "doors", "colour", "form", "generator"]
    assert options[1] == OptionDoc(name="doors", type="Positive", default="3", meaning="ways in.")
    assert options[4].default == '{"kind": "conv"}'
    assert vehicles.describe("cart") == ("Has no options.", [])
    assert [option.name for option in vehicles.describe("bicycle")[1]] == ["gears"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "trip.motor is required and missing"),
        ({"motor": {"power": 1}, "dors": 3}, "trip.dors: unknown key; did you mean doors?"),
        ({"motor": {"power": 1}, "doors": 0}, "trip.doors is 0: input should be greater than or equal to 1"),
        ({"motor": {"power": 1}, "colour": "tan"}, "trip.colour is \"tan\": input should be 'red' or 'blue'"),
        ({"motor": {"power": 1}, "form": "x"}, "trip.form is \"x\": input should be 'auto'"),
        ({"motor": {"powr": 1}}, "trip.motor.powr: unknown key; did you mean power?"),
        ({"motor": {"power": 999}}, "trip.motor: power is 999; use at most 900"),
        ({"motor": {"power": 1, "spare": {"power": 0}}}, "trip.motor.spare.power is 0: input should be greater than "),
    ],
    ids=str,
)
def test_types_are_those_of_the_module_and_of_whom_it_imports(vehicles, options, message):
    assert refused(vehicles, "car", options).startswith(message)


def test_option_of_a_type_that_would_have_to_be_imported_fails_with_what_is_allowed(vehicles):
    with pytest.raises(AssertionError, match="users_vehicles has an option of nosuchpackage, but its type must be a"):
        vehicles.declaration("tank")


def test_option_of_a_type_that_is_none_fails(vehicles):
    with pytest.raises(AssertionError, match="users_vehicles has an option of bicycle, but its type must be a class"):
        vehicles.declaration("ship")
