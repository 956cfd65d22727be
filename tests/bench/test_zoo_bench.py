"""The zoo: teachers of many kinds, and what init's recipes make of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from test_bench_quality import RESULT, Here

from raydfkd.bench import quality, zoo
from raydfkd.bench.controls import NOISE, REAL
from raydfkd.bench.zoo import (
    CHOSEN_ON,
    JUDGED_ON,
    TEACHERS,
    Row,
    Visit,
    markdown,
    to_json,
    visit_zoo,
    write_recipe,
)
from raydfkd.config.load import RECIPES, load_recipe
from raydfkd.errors import RecipeError
from raydfkd.networks.batchnorm import layers_with_statistics
from raydfkd.networks.build import build_network, count_parameters
from raydfkd.networks.teacher import build_teacher
from raydfkd.runner import draft, pace, small_students, teach
from raydfkd.runner.pace import Arithmetic, Speed

QUICK = ("teacher.train.epochs=1", "teacher.train.batch_size=256")
VISIT = Visit(teachers=("digits-lenet",), budget_s=0.5, seeds=(0,), split="validation", students=("half",))
FAST = Speed(synthesis=1e-5, student=1e-5, first_batch=40, next_batch=40, device=torch.device("cpu"), peak_mib=0)


@pytest.fixture
def quickly_taught(short_evidence, monkeypatch):
    """Teachers of an epoch, cells in this process, evidence of two steps."""
    monkeypatch.setattr(quality, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(zoo, "load_recipe", lambda name: load_recipe(name, QUICK))


def test_zoo_is_of_many_kinds_and_its_halves_share_no_teacher():
    assert len(set(TEACHERS)) == len(TEACHERS) >= 14
    assert not set(CHOSEN_ON) & set(JUDGED_ON)
    assert {path.stem for path in (RECIPES / "zoo").glob("*.yaml")} <= set(TEACHERS)
    recipes = [load_recipe(name) for name in TEACHERS]
    assert {2, 10, 26} == {recipe.teacher.classes for recipe in recipes}
    assert {1, 3} == {recipe.teacher.image_space.channels for recipe in recipes}
    without = [recipe for recipe in recipes if not layers_with_statistics(build_teacher(recipe))]
    assert len(without) >= 5


@pytest.mark.parametrize("name", TEACHERS)
def test_student_is_at_most_half_of_the_teacher(name):
    recipe = load_recipe(name)
    student = build_network(recipe.student, recipe.teacher, where="student", seed=0)
    assert count_parameters(student) <= count_parameters(build_teacher(recipe)) / 2
    assert recipe.teacher.train is not None
    assert recipe.real_data is not None


@pytest.mark.cluster
@pytest.mark.usefixtures("quickly_taught")
def test_recipe_is_inits_own_and_measured_once_between_the_controls(tmp_path, monkeypatch):
    monkeypatch.setattr(draft, "fastest", lambda _: (Arithmetic(), FAST))
    told = []
    visit = replace(VISIT, methods=("dafl", "deepinversion"))
    rows = visit_zoo(visit, tmp_path, told=told.append)
    assert rows == told
    assert {row.method for row in rows} == {"nayer_procedural", "dafl", REAL, NOISE}, "the last needs BatchNorm"
    assert [row.method for row in rows if row.is_chosen] == ["nayer_procedural"]
    assert all(row.teacher == "digits-lenet" and row.student == "half" for row in rows)
    assert all(row.share == row.result.student_top1 / row.result.teacher_top1 for row in rows)
    assert all({"drawn", "generated_moved", "steady_generated"} <= row.result.evidence.keys() for row in rows)
    (file,) = (tmp_path / "recipes").iterdir()
    page = file.read_text()
    assert "recipe: nayer_procedural " in page
    assert "Written by `raydfkd bench zoo digits-lenet`" in page
    monkeypatch.setattr(quality, "ProcessPoolExecutor", None)
    monkeypatch.setattr(teach, "teach", None)
    monkeypatch.setattr(draft, "fastest", None)  # another time the other arithmetic might be faster
    again = visit_zoo(visit, tmp_path)
    assert sorted(again, key=lambda row: row.method) == sorted(rows, key=lambda row: row.method)
    assert len(json.loads(to_json(rows))) == 4


def test_recipe_has_the_rounds_and_the_student_for_which_there_is_time(tmp_path, monkeypatch):
    recipe = load_recipe("fashion-vgg", ["teacher.weights=random", "teacher.train=null"])
    monkeypatch.setattr(small_students, "_share_kept", lambda found: None)
    pages = []
    for seconds in (1e-5, 0.2, 20):
        speed = replace(FAST, synthesis=seconds, student=seconds)
        monkeypatch.setattr(draft, "fastest", lambda _, speed=speed: (Arithmetic(), speed))
        page, _ = write_recipe(recipe, "fashion-vgg", "chosen", 60, tmp_path / str(seconds))
        pages.append(load_recipe(page))
    assert [page.rounds for page in pages] == [5, 3, 2], "a batch of 40 steps takes eight seconds, or far too long"
    assert [page.student.network for page in pages] == ["vgg_small", "plain_cnn", "plain_cnn"]


def test_recipe_for_the_clock_is_that_of_one_process_however_many_cores_there_are(tmp_path, monkeypatch):
    recipe = load_recipe("digits-convnet", ["teacher.weights=random", "teacher.train=null"])
    monkeypatch.setattr(draft, "fastest", lambda _: (Arithmetic(), replace(FAST, synthesis=2)))
    monkeypatch.setattr(pace, "_cores", lambda: 16)
    page, _ = write_recipe(recipe, "digits-convnet", "half", 600, tmp_path)
    made = load_recipe(page)
    assert (made.rounds, made.runtime.executor) == (3, "local"), "of 300 s for images a batch takes 80"


def test_teacher_that_is_not_there_is_named_before_any_work(tmp_path):
    with pytest.raises(RecipeError) as error:
        visit_zoo(replace(VISIT, teachers=("fashion-lenett",)), tmp_path)
    assert str(error.value) == "fashion-lenett is not in the zoo; did you mean fashion-lenet?"
    assert not list(tmp_path.iterdir())


def row(teacher, method, top1, student="half"):
    result = replace(RESULT, student_top1=top1, teacher_top1=0.8)
    is_chosen = method not in (REAL, NOISE, "dafl")
    return Row(teacher=teacher, student=student, method=method, is_chosen=is_chosen, result=result)


def test_table_has_shares_of_the_teachers_and_sums_up_each_half_apart():
    rows = [
        *(row("fashion-vgg", "nayer", 0.4), row("fashion-vgg", "nayer", 0.6), row("fashion-vgg", REAL, 0.8)),
        *(row("garment-pair", "deepdream", 0.2, "chosen"), row("mnist-plain", "procedural", 0.72)),
        *(row("garment-pair", NOISE, 0.02), row("mnist-plain", NOISE, 0.04)),
        row("garment-pair", "dafl", 0.7),
    ]
    lines = markdown(rows).splitlines()
    assert lines[2] == "| mnist-plain | procedural | 80.0 | - | 4.0 | 72.0 | 0.900 | - | - |"
    assert lines[3] == "| fashion-vgg | nayer | 80.0 | 80.0 | - | 50.0 (40.0-60.0) | 0.625 (0.500-0.750) | - | - |"
    assert lines[4] == "| garment-pair | deepdream | 80.0 | - | 2.0 | - | - | 20.0 | 0.250 |"
    assert "Half that methods were chosen on: mean 0.900, least 0.900." in lines
    assert "Half that methods were judged on: mean 0.500, least 0.250." in lines
