from __future__ import annotations

import math
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field
from toy import FAMILIES

from raydfkd.config.describe import OptionDoc
from raydfkd.config.registry import Registry
from raydfkd.errors import RecipeError, did_you_mean


class Motor(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    power: int
    fuel: Literal["petrol", "diesel"] = "petrol"


VEHICLES: Registry[Car] = Registry("vehicle", [], member="colour")


@VEHICLES.register("car")
class Car:
    """Drives on roads.

    More about it.

    Args:
        doors: ways in.
        motor: what drives it.
        name: on the plate; spans
            two lines.
    """

    def __init__(
        self,
        colour: str,
        *,
        doors: Annotated[int, Field(ge=1)],
        motor: Motor = Motor(power=50),  # noqa: B008 - frozen
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        if doors > 5:
            raise ValueError(f"doors is {doors}, but nobody builds more than 5")
        if name == "tank":
            raise RecipeError("name is 'tank', which is none")
        self.colour, self.doors, self.motor, self.weight, self.name = colour, doors, motor, weight, name


@VEHICLES.register("bicycle")
def bicycle(colour: str) -> Car:
    """Needs no fuel."""
    return Car(colour, doors=1)


def refused(name="car", /, **options):
    with pytest.raises(RecipeError) as error:
        VEHICLES.build(name, options, "red", where="trip.vehicle")
    return str(error.value)


def test_plugin_gets_what_the_engine_supplies_and_what_the_recipe_says():
    car = VEHICLES.build("car", {"doors": 3, "motor": {"power": 90, "fuel": "diesel"}}, "red", where="trip.vehicle")
    assert (car.colour, car.doors, car.weight, car.name) == ("red", 3, 1.0, None)
    assert car.motor == Motor(power=90, fuel="diesel")


def test_function_can_be_a_plugin():
    assert VEHICLES.build("bicycle", {}, "blue", where="trip.vehicle").colour == "blue"


def test_integer_is_accepted_where_a_float_is_wanted():
    weight = VEHICLES.build("car", {"doors": 3, "weight": 2}, "red", where="trip.vehicle").weight
    assert weight == 2.0
    assert isinstance(weight, float)


def test_names_are_sorted():
    assert VEHICLES.names() == ["bicycle", "car"]


def test_name_can_be_taken_once():
    with pytest.raises(AssertionError, match="vehicle car is registered twice"):
        VEHICLES.register("car")(bicycle)


def test_misspelled_plugin_is_named_with_the_closest_one():
    assert refused("carr") == "trip.vehicle: unknown vehicle 'carr'; did you mean car?"


def test_plugin_unlike_any_other_is_answered_with_all_of_them():
    assert refused("submarine") == "trip.vehicle: unknown vehicle 'submarine'; known: bicycle, car"


def test_misspelled_option_is_named_with_the_closest_one():
    assert refused(dors=3, doors=3) == "trip.vehicle.dors: unknown key; did you mean doors?"


def test_misspelled_option_inside_another_is_named_with_its_whole_key():
    assert refused(doors=3, motor={"power": 1, "fule": "petrol"}) == (
        "trip.vehicle.motor.fule: unknown key; did you mean fuel?"
    )


def test_option_of_a_plugin_without_any_is_refused():
    assert refused("bicycle", gears=3) == "trip.vehicle.gears: unknown key; there are none"


def test_what_the_engine_supplies_is_no_option():
    assert refused(doors=3, colour="blue").startswith("trip.vehicle.colour: unknown key; known: doors, motor")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "trip.vehicle.doors is required and missing"),
        ({"doors": "3"}, 'trip.vehicle.doors is "3": input should be a valid integer'),
        ({"doors": True}, "trip.vehicle.doors is true: input should be a valid integer"),
        ({"doors": 0}, "trip.vehicle.doors is 0: input should be greater than or equal to 1"),
        ({"doors": 3, "motor": {}}, "trip.vehicle.motor.power is required and missing"),
        ({"doors": 3, "motor": {"power": 1.5}}, "trip.vehicle.motor.power is 1.5: input should be a valid integer"),
        (
            {"doors": 3, "motor": {"power": 1, "fuel": "coal"}},
            "trip.vehicle.motor.fuel is \"coal\": input should be 'petrol' or 'diesel'",
        ),
        ({"doors": 3, "weight": math.nan}, "trip.vehicle.weight is NaN: input should be a finite number"),
        ({"doors": 3, "weight": -math.inf}, "trip.vehicle.weight is -Infinity: input should be a finite number"),
    ],
    ids=str,
)
def test_option_that_does_not_fit_its_annotation_is_refused_with_key_and_value(options, message):
    assert refused(**options) == message


def test_long_value_is_cut_short_in_the_message():
    assert len(refused(doors="x" * 1000)) < 160


def test_complaint_of_a_constructor_names_the_key():
    assert refused(doors=7) == "trip.vehicle: doors is 7, but nobody builds more than 5"


def test_recipe_error_of_a_constructor_passes_as_it_is():
    assert refused(doors=3, name="tank") == "name is 'tank', which is none"


def test_options_can_be_checked_without_building_anything():
    checked = VEHICLES.check("car", {"doors": 7}, where="trip.vehicle")
    assert checked == {"doors": 7, "motor": Motor(power=50), "weight": 1.0, "name": None}


def test_description_gives_the_meaning_and_every_option():
    meaning, options = VEHICLES.describe("car")
    assert meaning == "Drives on roads.\n\nMore about it."
    assert options[3].meaning == "on the plate; spans two lines."
    assert [option.name for option in options] == ["doors", "motor", "weight", "name"]
    assert options[1] == OptionDoc(
        name="motor", type="Motor", default='{"power": 50, "fuel": "petrol"}', meaning="what drives it."
    )
    assert [option.default for option in options if option.name != "motor"] == ["required", "1.0", "null"]


@pytest.mark.parametrize(
    ("word", "known", "answer"),
    [
        ("chek", ["run", "check"], "did you mean check?"),
        ("xyz", ["run", "check"], "known: check, run"),
        ("run", [], "there are none"),
    ],
)
def test_suggestion_is_the_closest_word_or_all_of_them(word, known, answer):
    assert did_you_mean(word, known) == answer


@pytest.mark.parametrize("family", FAMILIES)
def test_family_loads_its_plugins_by_itself(family):
    assert FAMILIES[family].names()


SHIPS: Registry[Car] = Registry("ship", [], member="colour")


@SHIPS.register("ferry")
def ferry(colour: str, *, loads: dict[Literal["bow", "stern"], str | Annotated[float, Field(lt=1)]] | tuple[str, ...]):
    """Carries cars."""


@SHIPS.form("built")
def built(name, where):
    if name != "oak":
        raise RecipeError(f"{where}: nobody builds of {name!r}")

    def build(colour: str, *, doors: int = 1) -> Car:
        """Is built of a material."""
        return Car(colour, doors=doors)

    return build


@pytest.mark.parametrize(
    ("loads", "message"),
    [
        ({"bow": 2.5}, "ship.loads.bow is 2.5: input should be a valid string or less than 1"),
        ({"keel": "x"}, "ship.loads.keel is \"keel\": input should be 'bow' or 'stern'"),
        (["a", 1], "ship.loads.1 is 1: input should be a valid string"),
    ],
)
def test_value_that_fits_none_of_the_forms_of_a_mapping_is_named_by_its_key(loads, message):
    with pytest.raises(RecipeError) as error:
        SHIPS.check("ferry", {"loads": loads}, where="ship")
    assert message in str(error.value)


def test_names_of_a_form_are_made_by_its_function_and_are_nobody_s_own_code():
    assert SHIPS.build("built:oak", {"doors": 3}, "red", where="ship").doors == 3
    assert not SHIPS.is_own("built:oak")
    assert SHIPS.is_own("yard:Ship")
    assert not SHIPS.is_own("ferry")
    with pytest.raises(RecipeError, match="^ship: nobody builds of 'tin'$"):
        SHIPS.check("built:tin", {}, where="ship")
    with pytest.raises(RecipeError, match="^ship.door: unknown key; did you mean doors?"):
        SHIPS.check("built:oak", {"door": 1}, where="ship")
