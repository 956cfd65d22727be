from __future__ import annotations

import dataclasses
from concurrent.futures import Future

import pytest

from raydfkd.bench import quality
from raydfkd.bench.quality import Cell, Result, bench_quality, markdown

OVERRIDES = (
    *("teacher.train.epochs=1", "teacher.options.widths=[8,16]", "student.options.widths=[4,8]"),
    *("synthesis.steps=4", "synthesis.batch_per_class=4", "synthesis.emissions=1"),
    *("transfer_set.images_per_class=8", "transfer_set.unit.images_per_class=4"),
)
RESULT = Result(
    recipe="a.yaml",
    budget_s=60,
    seed=0,
    split="validation",
    student_top1=0.5,
    teacher_top1=0.9,
    agreement=0.4,
    seconds=59.0,
    synthesis_seconds=30.0,
    images=600,
    student_steps=10,
    device="cpu",
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


def test_results_of_other_overrides_seeds_budgets_and_splits_are_kept_apart():
    cell = Cell(recipe="a.yaml", budget_s=60, seed=0, split="test")
    others = [
        dataclasses.replace(cell, **change)
        for change in (
            {"budget_s": 60.5},
            {"seed": 1},
            {"split": "validation"},
            {"overrides": ("x=1",)},
            {"recipe": "b"},
        )
    ]
    assert len({other.name for other in [cell, *others]}) == 6


@pytest.mark.parametrize(("top1", "shown"), [((0.5,), "50.0"), ((0.5, 0.7, 0.6), "60.0 (50.0-70.0)")])
def test_table_shows_the_mean_and_the_range_of_several_seeds(top1, shown):
    results = [dataclasses.replace(RESULT, seed=seed, student_top1=value) for seed, value in enumerate(top1)]
    assert markdown(results).splitlines()[2] == f"| a | 90.0 | {shown} |"


def test_table_has_a_row_for_each_recipe():
    table = markdown([RESULT, dataclasses.replace(RESULT, recipe="b", budget_s=120)]).splitlines()
    assert table[2:] == ["| a | 90.0 | 50.0 | - |", "| b | 90.0 | - | 50.0 |"]
