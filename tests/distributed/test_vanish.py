"""Machines of six workers each vanish without notice, over and over; the set has the bytes of a calm run.

Run by make test-cluster; some minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from clusters import COMMAND, Nodes, cluster, workers_of
from toy import quiet_events, synthesize_here

from raydfkd.config.load import load_recipe
from raydfkd.job import open_job

pytestmark = pytest.mark.cluster

JOB = Path(__file__).parents[2] / "jobs" / "chaos.yaml"
PER_NODE = 6
PATIENCE_S = 900.0
UNITS = 1000
SETTINGS = (
    f"transfer_set.images_per_class={2 * UNITS}",
    "distill.source.wait_for=2000",
    f"runtime.workers={{min: 0, max: {3 * PER_NODE}}}",
    "runtime.cpus_per_worker=0",
    "runtime.resources_per_worker={synth: 1}",
    "runtime.cpus_per_student_worker=0.5",
    "runtime.max_losses=5",
)


def settings(*, pause: float) -> tuple[str, ...]:
    synthesis = f"{{synthesizer: 'patient:Patient', pause: {pause}, objective: [cross_entropy]}}"
    return (f"synthesis={synthesis}", *SETTINGS)


class Machines:
    """The machines of the run, oldest first, and the count of workers that went with those that vanished."""

    def __init__(self, nodes: Nodes, environment: dict[str, str]) -> None:
        self._nodes, self._environment = nodes, environment
        self._there: list[str] = []
        self.num_lost = 0
        self.num_vanished = 0

    def join(self) -> None:
        self._there.append(self._nodes.add(synth=PER_NODE))

    def oldest_vanishes(self) -> None:
        """While each of its workers is at work."""
        self._vanish(self._there.pop(0), b"ray::SynthesisActor.run")

    def newest_vanishes_while_its_workers_are_built(self) -> None:
        self.join()
        self._vanish(self._there.pop(), b"ray::SynthesisActor")

    def _vanish(self, node: str, title: bytes) -> None:
        until = time.monotonic() + 120
        while (num_workers := len(workers_of(node, self._environment, title))) < PER_NODE - 1:  # one is between units
            assert time.monotonic() < until, f"{num_workers} workers on the machine that is to vanish"
            time.sleep(0.1)
        self.num_lost += len(workers_of(node, self._environment, b"ray::SynthesisActor"))
        self._nodes.kill(node)
        self.num_vanished += 1


def trouble(machines: Machines):
    """What happens, from one number of committed units to the next."""

    def replaced():
        machines.oldest_vanishes()
        machines.join()

    yield machines.newest_vanishes_while_its_workers_are_built
    yield replaced
    yield machines.oldest_vanishes  # and nobody comes for it
    yield replaced  # so there was none left for a while
    yield machines.newest_vanishes_while_its_workers_are_built
    yield machines.join
    yield replaced
    yield replaced
    yield machines.newest_vanishes_while_its_workers_are_built
    yield replaced
    yield replaced
    yield replaced


def test_machines_that_vanish_never_end_a_run_and_change_no_byte(tmp_path):
    alone = open_job(load_recipe(JOB, settings(pause=0.0), str(tmp_path / "alone")))
    synthesize_here(alone, quiet_events(tmp_path))
    expected = alone.snapshot().content_digest()
    job = open_job(load_recipe(JOB, settings(pause=0.1), str(tmp_path / "run")))
    arguments = [*COMMAND, "run", str(JOB), "--run-dir", str(tmp_path / "run"), "--json"]
    arguments += [part for setting in settings(pause=0.1) for part in ("--set", setting)]
    began = time.monotonic()
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with cluster(PYTHONPATH=path) as (nodes, environment), (tmp_path / "log").open("w") as log:
        machines = Machines(nodes, environment)
        machines.join()
        machines.join()
        driver = subprocess.Popen(
            arguments, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        try:
            for number, act in enumerate(trouble(machines)):
                while len(job.transfer_set.committed()) < 30 * (number + 1):
                    assert driver.poll() is None, (tmp_path / "log").read_text()[-3000:]
                    assert time.monotonic() < began + PATIENCE_S, f"stuck before trouble {number}"
                    time.sleep(0.2)
                act()
            output, _ = driver.communicate(timeout=PATIENCE_S)
        finally:
            driver.kill()
    assert driver.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    report = json.loads(output)
    assert report["content_digest"] == expected
    assert report["units"]["committed"] == len(job.units) == UNITS
    assert report["units"]["quarantined"] == 0
    assert machines.num_lost >= 50
    print(  # noqa: T201 - what the page on clusters reports
        f"\nvanish: {time.monotonic() - began:.0f} s, {machines.num_vanished} machines with {machines.num_lost} workers"
    )
