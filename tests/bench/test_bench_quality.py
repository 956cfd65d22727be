from __future__ import annotations

import dataclasses
import json
from concurrent.futures import Future
from dataclasses import replace
from importlib import import_module

import pytest

from raydfkd.bench import quality
from raydfkd.bench.quality import Cell, Result, bench_quality, markdown
from raydfkd.config.load import load_recipe
from raydfkd.errors import RecipeError
from raydfkd.runner import budget

OVERRIDES = (
    *("teacher.train.epochs=1", "teacher.options.widths=[8,16]", "student.options.widths=[4,8]"),
    *("synthesis.steps=4", "synthesis.batch_per_class=4", "synthesis.emissions=1"),
    *("transfer_set.images_per_class=8", "transfer_set.unit.images_per_class=4"),
)
RESULT = Result(
    recipe="a.yaml",
    digest="0a1b2c3d",
    budget_s=60,
    seed=0,
    split="validation",
    student_top1=0.5,
    teacher_top1=0.9,
    agreement=0.4,
    seconds=59.0,
    synthesis_seconds=30.0,
    wall_seconds=62.0,
    images=600,
    student_steps=10,
    device="cpu",
    versions={"raydfkd": "0.1.0+00000000"},
    command="raydfkd bench quality a.yaml --budget 60 --seed 0 --split validation",
)


class Here:
    """A pool that starts no process, which takes longer than all that is tested."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, work, *args):
        done = Future()
        done.set_result(work(*args))
        return done


def test_a_cell_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "ProcessPoolExecutor", Here)
    cell = Cell(recipe="digits-generators", budget_s=2.0, seed=3, split="validation", overrides=OVERRIDES)
    (result,) = bench_quality([cell], tmp_path)
    assert 0 < result.student_top1 <= 1
    assert result.images >= 40
    assert result.student_steps >= 1
    assert 0 < result.synthesis_seconds < result.seconds
    assert result.command.startswith(
        "raydfkd bench quality digits-generators --budget 2 --seed 3 --split validation --set"
    )
    monkeypatch.setattr(quality, "ProcessPoolExecutor", None)
    monkeypatch.setattr(quality, "_teach", None)
    assert list(bench_quality([cell], tmp_path)) == [result]


def test_recipe_whose_student_nobody_could_judge_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "ProcessPoolExecutor", None)
    blind = ("real_data=null", "teacher.train=null", "teacher.weights=random")
    cell = Cell(recipe="digits-generators", budget_s=2.0, seed=3, split="validation", overrides=blind)
    with pytest.raises(RecipeError, match="^digits-generators: real_data is missing, on which the student is judged; "):
        list(bench_quality([cell], tmp_path))


def test_set_that_the_clock_cut_within_a_unit_is_judged_like_any_other(tmp_path, monkeypatch):
    run_within = budget.run_within

    def cut(recipe, seconds, **arguments):
        outcome = run_within(recipe, seconds, **arguments)
        spec = outcome.recipe.transfer_set.model_copy(update={"images_per_class": 41})
        return replace(outcome, recipe=outcome.recipe.model_copy(update={"transfer_set": spec}))

    monkeypatch.setattr(budget, "run_within", cut)
    monkeypatch.setattr(quality, "ProcessPoolExecutor", Here)
    cell = Cell(recipe="digits-generators", budget_s=2.0, seed=3, split="validation", overrides=OVERRIDES)
    (result,) = bench_quality([cell], tmp_path)
    assert result.agreement > 0


def recipe_file(folder, name="own.yaml", text=""):
    path = folder / name
    path.write_text("recipe: digests.yaml\n" + text)
    (folder / "digests.yaml").write_text("recipe: digits-generators\nteacher: {train: null, weights: random}\n")
    return str(path)


def files_of(monkeypatch, tmp_path, *cells):
    """Names of the cells' results, none of which is measured."""
    names = []
    monkeypatch.setattr(quality.Store, "exists", lambda _, name: bool(names.append(name)) or True)
    monkeypatch.setattr(quality.Store, "get", lambda *_: json.dumps(dataclasses.asdict(RESULT)))
    list(bench_quality(cells, tmp_path))
    return names


def test_results_of_other_overrides_seeds_budgets_and_splits_are_kept_apart(tmp_path, monkeypatch):
    cell = Cell(recipe=recipe_file(tmp_path), budget_s=60, seed=0, split="test")
    others = [
        dataclasses.replace(cell, **change)
        for change in (
            {"budget_s": 60.5},
            {"seed": 1},
            {"split": "validation"},
            {"overrides": ("distill.steps=7",)},
            {"recipe": "digits-generators"},
        )
    ]
    assert len(set(files_of(monkeypatch, tmp_path, cell, *others))) == 6


def test_a_recipe_that_was_changed_is_another_cell_and_one_that_was_moved_is_not(tmp_path, monkeypatch):
    cell = Cell(recipe=recipe_file(tmp_path), budget_s=60, seed=0, split="test")
    (before,) = files_of(monkeypatch, tmp_path, cell)
    recipe_file(tmp_path, text="# a comment\n")
    assert files_of(monkeypatch, tmp_path, cell) == [before]
    recipe_file(tmp_path, text="distill: {steps: 77}\n")
    (changed,) = files_of(monkeypatch, tmp_path, cell)
    assert changed != before
    (tmp_path / "other").mkdir()
    moved = dataclasses.replace(cell, recipe=recipe_file(tmp_path / "other"))
    assert files_of(monkeypatch, tmp_path, moved) == [before]


def test_a_changed_engine_is_another_cell_and_another_teacher_where_it_trains_one(tmp_path, monkeypatch):
    cells = [Cell(recipe=name, budget_s=60, seed=0, split="test") for name in ("digits-generators", "digits-adaptive")]
    before = files_of(monkeypatch, tmp_path, *cells)
    teacher = quality._teacher_file(load_recipe("digits-generators"))
    monkeypatch.setattr("raydfkd.bench.engine.code_digest", lambda: "another")
    assert not set(before) & set(files_of(monkeypatch, tmp_path, *cells))
    assert quality._teacher_file(load_recipe("digits-generators")) == teacher
    monkeypatch.setattr(quality, "code_digest", lambda *parts: "another" if parts == quality.TEACHING else "same")
    assert quality._teacher_file(load_recipe("digits-generators")) != teacher


def test_other_weights_in_the_same_file_are_another_cell(tmp_path, monkeypatch):
    weights = tmp_path / "teacher.safetensors"
    overrides = ("teacher.train=null", f"teacher.weights={weights}")
    cell = Cell(recipe="digits-generators", budget_s=60, seed=0, split="test", overrides=overrides)
    found = []
    for content in (b"one", b"two", b"one"):
        weights.write_bytes(content)
        found += files_of(monkeypatch, tmp_path, cell)
    assert found[0] == found[2] != found[1]


def test_weights_that_cannot_be_read_are_named_in_one_line(tmp_path):
    overrides = ("teacher.train=null", f"teacher.weights={tmp_path}")
    cell = Cell(recipe="digits-generators", budget_s=60, seed=0, split="test", overrides=overrides)
    with pytest.raises(RecipeError, match=r"^teacher\.weights is '.*': a folder; give a file in it"):
        list(bench_quality([cell], tmp_path / "results"))


def test_a_cell_opens_its_teacher_once_before_the_clock_and_once_within_it(tmp_path, monkeypatch):
    opened = []

    def counted(name):
        load = import_module(name).open_teacher
        monkeypatch.setattr(f"{name}.open_teacher", lambda *args, **kw: opened.append(name) or load(*args, **kw))

    counted("raydfkd.runner.check")
    counted("raydfkd.runner.budget")
    monkeypatch.setattr(quality, "ProcessPoolExecutor", Here)
    list(
        bench_quality(
            [Cell(recipe="digits-generators", budget_s=2.0, seed=3, split="test", overrides=OVERRIDES)], tmp_path
        )
    )
    assert opened == ["raydfkd.runner.check", "raydfkd.runner.budget"]


def test_the_user_s_own_module_is_part_of_a_cell(tmp_path, monkeypatch):
    module = tmp_path / "own_criterion_of_bench.py"
    monkeypatch.syspath_prepend(tmp_path)
    cell = Cell(
        recipe=recipe_file(tmp_path, text="distill: {criterion: 'own_criterion_of_bench:Own'}\n"),
        budget_s=60,
        seed=0,
        split="test",
    )
    found = []
    for line in ("class Own: __call__ = min", "class Own: __call__ = max"):
        module.write_text(line)
        found += files_of(monkeypatch, tmp_path, cell)
    assert len(set(found)) == 2


@pytest.mark.parametrize(
    "change", ["seed=1", "teacher.options.widths=[8,16]", "teacher.train.epochs=3", "real_data={kind: fashion_mnist}"]
)
def test_a_shared_teacher_is_named_by_all_that_its_training_depends_on(change):
    one, other = (quality._teacher_file(load_recipe("digits-generators", given)) for given in ([], [change]))
    assert one != other
    assert one == quality._teacher_file(load_recipe("digits-generators", ["distill.steps=7"], run_dir="elsewhere"))


def test_all_seeds_and_budgets_of_a_recipe_share_a_teacher(tmp_path, monkeypatch):
    taught = []
    monkeypatch.setattr(quality, "_teach", lambda recipe, folder: taught.append(recipe.teacher.weights))
    monkeypatch.setattr(quality, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(
        quality, "measure", lambda plan: dataclasses.replace(RESULT, recipe=plan.recipe.teacher.weights)
    )
    cells = [
        Cell(recipe="digits-generators", budget_s=budget, seed=seed, split="test")
        for seed in (0, 1)
        for budget in (1, 2)
    ]
    results = list(bench_quality(cells, tmp_path))
    assert len(results) == 4
    assert {result.recipe for result in results} == set(taught)
    assert len(taught) == 1


@pytest.mark.parametrize(("top1", "shown"), [((0.5,), "50.0"), ((0.5, 0.7, 0.6), "60.0 (50.0-70.0)")])
def test_table_shows_the_mean_and_the_range_of_several_seeds(top1, shown):
    results = [dataclasses.replace(RESULT, seed=seed, student_top1=value) for seed, value in enumerate(top1)]
    assert markdown(results).splitlines()[2] == f"| a (0a1b2c3d) | 90.0 | {shown} |"


def test_table_shows_what_each_budget_bought():
    results = [
        RESULT,
        dataclasses.replace(RESULT, budget_s=120, images=1300),
        dataclasses.replace(RESULT, seed=1, images=800),
    ]
    assert markdown(results).splitlines()[3] == "| images, steps, wall s | | 700 (600-800); 10; 62 | 1,300; 10; 62 |"


def test_table_has_a_row_for_each_recipe_as_it_was():
    others = [
        dataclasses.replace(RESULT, recipe="b", budget_s=120),
        dataclasses.replace(RESULT, digest="ffffffff", student_top1=0.6),
    ]
    assert markdown([RESULT, *others]).splitlines()[2::2] == [
        "| a (0a1b2c3d) | 90.0 | 50.0 | - |",
        "| b (0a1b2c3d) | 90.0 | - | 50.0 |",
        "| a (ffffffff) | 90.0 | 60.0 | - |",
    ]
