"""Drivers that come in twos, are killed or interrupted: the same set in the end, without anybody's help.

Run by make test-cluster; some minutes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
from clusters import COMMAND, cluster
from small import small_recipe
from toy import fresh_student_of, quiet_events, synthesize_here

from raydfkd.job import Job, open_job
from raydfkd.report.metrics import read_metrics

pytestmark = pytest.mark.cluster

PATIENCE_S = 400.0
STOPS_WITHIN_S = 15.0
"""10 s for what is in flight, and what Ray takes to shut down."""
STOPS_NOW_S = 5.0
SETTINGS = (
    "synthesis.steps=60",
    "transfer_set.unit={classes: 10, images_per_class: 4}",
    "runtime={workers: {min: 1, max: 2}, cpus_per_worker: 0.25, cpus_per_student_worker: 0.5, max_losses: 5}",
)
STEPS = 600


class Driver:
    """A process of the command line."""

    def __init__(self, name: str, folder: Path, environment: dict[str, str], *overrides: str) -> None:
        recipe = folder / "recipe.yaml"
        if not recipe.exists():
            made = small_recipe(folder / "run", *SETTINGS, f"distill.steps={STEPS}", *overrides)
            recipe.write_text(json.dumps(made.model_dump(mode="json")))
        self._error = folder / f"{name}.err"
        self.process = subprocess.Popen(
            [*COMMAND, "run", str(recipe), "--json"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=self._error.open("w"),
            text=True,
            start_new_session=True,
        )

    @property
    def said(self) -> str:
        return self._error.read_text()

    def report(self) -> dict:
        """Await the end, which is to be a good one."""
        output, _ = self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode == 0, self.said[-3000:]
        return json.loads(output.splitlines()[-1])

    def stop(self, *, times: int = 1) -> float:
        """Ctrl-C; seconds from the last one until the process has ended."""
        for number in range(times):
            time.sleep(0.5 * number)
            began = time.monotonic()
            os.killpg(self.process.pid, signal.SIGINT)
        assert self.process.wait(60) == 130, self.said[-3000:]
        assert "the same command goes on from there" in self.said.splitlines()[-1]
        assert "Traceback" not in self.said
        return time.monotonic() - began

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> str:
    """What one process makes of the recipe."""
    folder = tmp_path_factory.mktemp("alone")
    job = open_job(small_recipe(folder, *SETTINGS))
    synthesize_here(job, quiet_events(folder))
    return job.snapshot().content_digest()


def job_in(folder: Path) -> Job:
    return open_job(small_recipe(folder / "run", *SETTINGS))


def student_steps(folder: Path) -> list[int]:
    metrics = folder / "run" / "metrics.jsonl"
    entries = read_metrics(metrics) if metrics.exists() else []
    return [entry["step"] for entry in entries if entry["event"] == "student"]


def until(condition: Callable[[], object], *drivers: Driver) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, [driver.said[-1000:] for driver in drivers]
        assert all(driver.process.poll() is None for driver in drivers), [driver.said[-3000:] for driver in drivers]
        time.sleep(0.05)


def check_set(job: Job, expected: str) -> None:
    commits = job.snapshot().commits
    assert [commit.unit for commit in commits] == sorted(job.unit_ids)
    assert sum(commit.images for commit in commits) == job.planned_images
    assert job.snapshot().content_digest() == expected
    assert not [verdict for verdict in job.transfer_set.verify() if verdict.damage]


def test_two_drivers_of_one_recipe_make_one_set_and_one_student(tmp_path, expected):
    with cluster() as (nodes, environment):
        nodes.add(), nodes.add()
        drivers = [Driver(name, tmp_path, environment) for name in "ab"]
        try:
            first, second = [driver.report() for driver in drivers]
        finally:
            for driver in drivers:
                driver.kill()
    assert first["content_digest"] == second["content_digest"] == expected
    assert first["agreement"] == second["agreement"]
    assert first["units"]["quarantined"] == second["units"]["quarantined"] == 0
    check_set(job_in(tmp_path), expected)
    assert sum("trains it in this run_dir; waiting for it" in driver.said for driver in drivers) == 1
    assert student_steps(tmp_path) == [1, *range(10, STEPS + 1, 10)]
    assert json.loads((tmp_path / "run" / "report.json").read_text())["content_digest"] == expected


def test_a_second_driver_goes_on_with_the_training_of_one_that_is_killed(tmp_path, expected):
    with cluster() as (nodes, environment):
        nodes.add(), nodes.add()
        drivers = {driver.process.pid: driver for driver in (Driver(name, tmp_path, environment) for name in "ab")}
        try:
            until(lambda: any("waiting for it" in driver.said for driver in drivers.values()), *drivers.values())
            until(lambda: list(tmp_path.glob("run/student-*/checkpoint_*/state.pt")), *drivers.values())
            [holder] = (tmp_path / "run" / "train").glob("*.holder")
            found = re.match(r"process (\d+) on ", holder.read_text())
            assert found, "the lock's holder is told"
            drivers[int(found[1])].kill()
            before, killed = len(student_steps(tmp_path)), time.monotonic()
            other = next(driver for pid, driver in drivers.items() if pid != int(found[1]))
            until(lambda: len(student_steps(tmp_path)) > before, other)
            seconds = time.monotonic() - killed
            report = other.report()
        finally:
            for driver in drivers.values():
                driver.kill()
    assert report["content_digest"] == expected
    check_set(job_in(tmp_path), expected)
    after = student_steps(tmp_path)[before:]
    assert after[-1] == STEPS
    assert after[0] > 1, "training began anew instead of at its checkpoint"
    print(f"\nkill to a step under the other driver: {seconds:.1f} s")  # noqa: T201 - a figure to read


def test_interrupted_runs_end_in_time_say_how_to_go_on_and_do(tmp_path, expected):
    job = job_in(tmp_path)
    # Only a checkpoint made for the interruption can be gone on from.
    rare = "distill.checkpoint_every=1000000"
    took = {}
    with cluster() as (nodes, environment):
        nodes.add(), nodes.add()
        driver = Driver("synthesis", tmp_path, environment, rare)
        try:
            until(job.transfer_set.committed, driver)
            took["in synthesis"] = driver.stop()
            num_committed = len(job.transfer_set.committed())
            assert num_committed < len(job.units)

            driver = Driver("training", tmp_path, environment)
            until(lambda: job.is_closed and student_steps(tmp_path)[-1:] > [10], driver)
            took["in training"] = driver.stop()
            before = student_steps(tmp_path)
            assert before[-1] < STEPS, "the training was over before it was interrupted"

            driver = Driver("now", tmp_path, environment)
            until(lambda: len(student_steps(tmp_path)) > len(before), driver)
            took["twice"] = driver.stop(times=2)

            driver = Driver("again", tmp_path, environment)
            report = driver.report()
        finally:
            driver.kill()
    assert report["content_digest"] == expected
    check_set(job, expected)
    after = student_steps(tmp_path)[len(before) :]
    assert after[0] >= before[-1] > 1, "training began anew instead of where it was interrupted"
    assert after[-1] == STEPS
    print(f"\ninterruption to end: {took}")  # noqa: T201 - a figure to read
    assert took["in synthesis"] < STOPS_WITHIN_S
    assert took["in training"] < STOPS_WITHIN_S
    assert took["twice"] < STOPS_NOW_S
    state = safetensors.torch.load_file(tmp_path / "run" / "student.safetensors")
    assert state.keys() == fresh_student_of(job).state_dict().keys()
