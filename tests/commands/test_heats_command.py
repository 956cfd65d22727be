"""The command heats: who takes part, what is written, what is refused before any work."""

from __future__ import annotations

import json

import pytest
import torch
from zoo import ZOO, make

from raydfkd.cli import app
from raydfkd.config.load import load_recipe
from raydfkd.errors import RecipeError
from raydfkd.runner import heats as module

GREY = next(row for row in ZOO if row.name == "28x28, grey")
PAGE = """
recipe: procedural
name: mine
teacher:
  network: zoo:plain
  weights: plain.pt
  classes: 4
  image_space: {channels: 1, size: 28, mean: [0.5], std: [0.5]}
student: {network: convnet, options: {widths: [4, 8]}}
transfer_set: {images_per_class: 40, unit: {classes: 4, images_per_class: 20}}
distill: {steps: 20}
"""


@pytest.fixture
def raced(tmp_path, monkeypatch):
    """Calls heats on a recipe of the folder, where the second contestant always wins; returns who took part."""
    monkeypatch.chdir(tmp_path)
    make(GREY, tmp_path)
    from zoo import plain

    torch.save(plain().state_dict(), "plain.pt")
    (tmp_path / "mine.yaml").write_text(PAGE)
    asked = []

    def heats(recipes, seconds, told):
        asked.append((dict(recipes), seconds))
        return list(recipes)[1]

    monkeypatch.setattr(module, "heats", heats)

    def call(*more):
        assert app(["heats", "mine.yaml", *more], standalone_mode=False) == 0
        return asked[0]

    return call


def test_methods_that_suit_meet_the_recipe_as_it_is_and_the_winner_is_written(raced, tmp_path, capsys):
    recipes, seconds = raced("--budget", "2m", "--write", "best.yaml")
    assert seconds == 120
    assert next(iter(recipes)) == "as it is"
    assert {"nayer_procedural", "procedural", "deepdream"} < set(recipes)
    assert not {"nayer", "deepinversion"} & set(recipes), "the teacher has no BatchNorm"
    assert len({recipe.teacher.weights for recipe in recipes.values()}) == 1
    best = list(recipes)[1]
    assert capsys.readouterr().out.splitlines()[-1] == f"best      {best}   best.yaml"
    assert load_recipe("best.yaml").synthesis == recipes[best].synthesis


def test_named_methods_alone_take_part(raced, capsys):
    recipes, _ = raced("--method", "deepdream", "--json")
    assert list(recipes) == ["as it is", "deepdream"]
    assert json.loads(capsys.readouterr().out) == {"best": "deepdream", "recipe": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "deepinversion"], "--method is 'deepinversion', which does not suit: .*BatchNorm"),
        (["--write", "mine.yaml"], "--write is 'mine.yaml', which is there already"),
        (["--set", "teacher.weights=none.pt"], "teacher.weights is '.*none.pt': no such file"),
        (["--budget", "soon"], "--budget"),
    ],
)
def test_mistakes_are_found_before_any_heat(raced, arguments, message):
    with pytest.raises(RecipeError, match=message):
        raced(*arguments)
