"""The pool's real code under many workers in simulated time: what its driver asks of Ray and of the store."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from simulated_ray import Weather, drive

pytestmark = pytest.mark.cluster

WORKERS, UNITS = 64, 500
WEATHER = Weather(workers=WORKERS, unit_s=60, preempt_per_hour=10)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return drive(tmp_path_factory.mktemp("simulated"), WEATHER, UNITS)


def test_units_are_each_made_once_while_machines_come_and_go(found):
    assert found.committed == found.units
    assert Counter(found.made) == Counter(found.units)
    assert found.calls["preemptions"] > 50
    assert UNITS < found.attempted <= UNITS + found.calls["preemptions"]


def test_machines_that_were_taken_away_cost_the_run_little_time(found):
    undisturbed = WEATHER.build_s + UNITS / WORKERS * WEATHER.unit_s
    assert undisturbed < found.simulated_s < 2.5 * undisturbed


def test_actors_are_asked_how_far_they_are_every_two_seconds_and_waited_for_twice_a_second(found):
    busy_s = found.calls["run"] * 1.2 * WEATHER.unit_s
    assert found.calls["progress"] < busy_s / 2
    ticks = 2 * found.simulated_s + found.calls["run"] + found.calls["ready"]
    assert found.calls["wait"] < 4 * ticks, "each tick waits for work, takes what there is, and asks for answers"
    assert found.calls["refs"] <= found.calls["wait"] * WORKERS


def test_worker_takes_six_requests_for_a_unit_that_nothing_happens_to(found):
    """Saved state, part, record, token, whether it is damaged, state removed; and what machines cost that went away."""
    told = found.calls["told"]
    assert found.workers["put_new"] == UNITS
    assert UNITS <= found.workers["get"] <= UNITS + 3 * told
    assert sum(found.workers.values()) <= 6 * UNITS + 8 * told


def test_driver_looks_at_the_set_every_five_seconds_and_never_reads_a_record(found):
    looks = found.simulated_s / 5 + 2
    assert found.driver["get"] <= looks, "the token"
    assert found.driver["names"] <= 2 * looks + 4, "two short listings each"
    assert sum(found.driver.values()) <= 3 * looks + 10


def test_same_weather_is_the_same_run(tmp_path):
    weather = replace(WEATHER, workers=16)
    one, other = (drive(tmp_path / name, weather, 60) for name in ("one", "other"))
    assert one.calls["preemptions"] > 0
    assert (one.simulated_s, one.attempted, one.calls) == (other.simulated_s, other.attempted, other.calls)
