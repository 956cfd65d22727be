"""The queue in simulated time."""

from __future__ import annotations

import json

import pytest
from toy import toy_recipe

from raydfkd.cli import app
from raydfkd.errors import RecipeError
from raydfkd.runner.simulation import Fleet, percentiles, simulate
from raydfkd.units import Request, WorkUnit

UNITS = [
    WorkUnit(id=f"u{number:03}", request=Request(classes=(0,), images_per_class=1, seed=number, class_seeds=[number]))
    for number in range(40)
]


def test_without_preemption_units_are_shared_out_evenly_and_nothing_is_lost():
    run = simulate(UNITS, 10, 5, Fleet(nodes=8, start_s=30), seed=0)
    assert run.wall_s == 30 + 5 * 10
    assert run.machine_s == 8 * run.wall_s
    assert (run.wasted_s, run.preemptions) == (0, 0)


def test_last_units_keep_only_some_machines_busy():
    assert simulate(UNITS[:9], 10, 5, Fleet(nodes=8, start_s=0), seed=0).wall_s == 20


@pytest.mark.parametrize("seed", range(5))
def test_what_is_lost_is_less_than_a_checkpoint_for_each_machine(seed):
    fleet = Fleet(nodes=4, preempt_per_hour=20, start_s=60)
    run = simulate(UNITS, 300, 50, fleet, seed=seed)
    assert run.preemptions > 10
    assert 0 < run.wasted_s <= 50 * run.preemptions
    assert run.machine_s == pytest.approx(4 * run.wall_s)
    assert run.wall_s > (40 * 300 + run.wasted_s) / 4
    assert run == simulate(UNITS, 300, 50, fleet, seed=seed)


def test_work_without_checkpoints_is_lost_as_a_whole():
    fleet = Fleet(nodes=4, preempt_per_hour=6, start_s=60)
    often, never = (simulate(UNITS, 300, every, fleet, seed=1) for every in (10, 300))
    assert never.wasted_s > 5 * often.wasted_s
    assert never.wall_s > often.wall_s


def test_percentiles_grow_with_their_share():
    half, most = percentiles(UNITS, 300, 50, Fleet(nodes=4, preempt_per_hour=6, start_s=60), (0.5, 0.9))
    assert half.wall_s < most.wall_s
    assert half.wasted_s < most.wasted_s


def test_command_prints_both_percentiles(tmp_path, capsys):
    toy_recipe(tmp_path)
    arguments = ["plan", str(tmp_path / "toy.yaml"), "--set", "teacher.weights=random", "--device", "h200"]
    arguments += ["--simulate", "nodes=4,preempt_per_hour=1,start_s=180"]
    assert app([*arguments, "--json"], standalone_mode=False) == 0
    found = json.loads(capsys.readouterr().out)["simulated"]["h200"]
    assert found["p50"]["wall_s"] <= found["p90"]["wall_s"]
    assert app(arguments, standalone_mode=False) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("  90% of runs within ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node=4", "--simulate has 'node=4', which is none of its keys; did you mean nodes"),
        ("nodes=many", "--simulate has 'nodes=many'; give a number, as in nodes=8"),
        ("nodes=0", "--simulate has nodes=0; give a whole number from 1"),
    ],
)
def test_mistakes_name_key_and_value(text, message):
    with pytest.raises(RecipeError, match=message):
        Fleet.parse(text)
