"""Everything that can go away goes away, and the set has the same bytes as without the trouble.

Run by make test-cluster; some minutes.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from clusters import COMMAND, Nodes, cluster, processes
from s3_server import S3Server
from toy import quiet_events, synthesize_here

from raydfkd.config.load import load_recipe
from raydfkd.data.garbage import collect_garbage
from raydfkd.job import Job, open_job

pytestmark = pytest.mark.cluster

JOB = Path(__file__).parents[2] / "jobs" / "chaos.yaml"
PATIENCE_S = 540.0
KILL_AFTER = (5, 20)
"""Units between two kills, at least and at most; by units, since a slow machine takes seconds to start a worker."""


class Trouble:
    """What is done to a run once so many of its units are committed."""

    def __init__(self, nodes: Nodes, server: S3Server, driver: Driver) -> None:
        first, _ = nodes.add(synth=2), nodes.add(synth=2)
        self.told: list[str] = []
        self._due = [
            (20, "a machine is killed", lambda: nodes.kill(first)),
            (40, "a machine joins", lambda: nodes.add(synth=2)),
            (60, "the driver is killed", driver.kill_and_run_again),
            (90, "the object store restarts", lambda: restart(server)),
            (120, "the driver is killed", driver.kill_and_run_again),
        ]

    def make(self, num_committed: int) -> None:
        while self._due and num_committed >= self._due[0][0]:
            _, name, act = self._due.pop(0)
            self.told.append(name)
            act()


def restart(server: S3Server) -> None:
    server.stop()
    time.sleep(3)
    server.start()


class Driver:
    """The command, again whenever it was killed."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self._arguments, self._environment, self._log = arguments, environment, log
        self._begin()

    def _begin(self) -> None:
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                self._arguments,
                env=self._environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def kill_and_run_again(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._begin()


def settings(uri: str) -> list[str]:
    return [
        f"transfer_set.uri={uri}",
        "runtime.workers={min: 1, max: 4}",
        "runtime.cpus_per_worker=0",
        "runtime.resources_per_worker={synth: 1}",
        "runtime.cpus_per_student_worker=0.5",
    ]


def test_chaos_changes_no_byte_of_the_set(tmp_path, monkeypatch):
    alone = open_job(load_recipe(JOB, (), str(tmp_path / "alone")))
    synthesize_here(alone, quiet_events(tmp_path))
    expected = alone.snapshot().content_digest()
    assert len(alone.units) == 200

    server = S3Server(tmp_path / "weed")
    server.start()
    server.make_bucket("chaos")
    overrides = settings("s3://chaos/set")
    arguments = [*COMMAND, "run", str(JOB), "--run-dir", str(tmp_path / "run"), "--json"]
    arguments += [part for override in overrides for part in ("--set", override)]
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    job = open_job(load_recipe(JOB, overrides, str(tmp_path / "run")))
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.callback(server.stop)
        nodes, environment = stack.enter_context(cluster(**server.environment))
        driver = Driver(arguments, environment, tmp_path / "driver.log")
        stack.callback(lambda: driver.process.kill())  # noqa: PLW0108 - the process of that time
        trouble = Trouble(nodes, server, driver)
        num_killed = await_end(job, environment, driver, trouble, random.Random(0))
        output, _ = driver.process.communicate(timeout=60)
        log = (tmp_path / "driver.log").read_text()
        assert driver.process.returncode == 0, log[-3000:]
        report = json.loads(output)  # which is all that is on standard output
        assert report["content_digest"] == expected
        assert report["units"]["committed"] == 200
        assert report["units"]["quarantined"] == 0
        commits = job.snapshot().commits
        assert len(commits) == len({commit.unit for commit in commits}) == 200
        assert {commit.generation for commit in commits} == {0}
        assert sum(commit.images for commit in commits) == job.planned_images
        garbage = collect_garbage(job.transfer_set, older_than_s=0, dry_run=False)
        named = {part.path for commit in commits for part in commit.parts}
        assert set(job.transfer_set.store.list("parts")) == named
        assert not [verdict for verdict in job.transfer_set.verify() if verdict.damage]
    assert trouble.told.count("the driver is killed") == 2
    assert len(trouble.told) == 5
    assert num_killed >= 8
    print(  # noqa: T201 - what README reports
        f"\nchaos: {time.monotonic() - began:.0f} s, {num_killed} workers killed, {', '.join(trouble.told)}; "
        f"{len(garbage.paths)} objects of lost attempts collected"
    )


def await_end(job: Job, environment: dict[str, str], driver: Driver, trouble: Trouble, rng: random.Random) -> int:
    """Kill a worker now and then and make trouble until the driver ends; returns the number of workers killed."""
    num_killed, deadline, next_kill = 0, time.monotonic() + PATIENCE_S, KILL_AFTER[0]
    while driver.process.poll() is None:
        assert time.monotonic() < deadline, f"not done after {PATIENCE_S:.0f} s; so far {', '.join(trouble.told)}"
        num_committed = len(job.transfer_set.committed())
        trouble.make(num_committed)
        workers = processes(environment, b"ray::SynthesisActor.run")
        if workers and next_kill <= num_committed < 190:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(workers), signal.SIGKILL)
                num_killed += 1
            next_kill = num_committed + rng.randint(*KILL_AFTER)
        time.sleep(0.2)
    return num_killed
