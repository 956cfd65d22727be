"""Room for a synthesis actor or a training worker, but never for both at once. Run by make test-cluster."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from clusters import COMMAND, cluster, processes, workers_of

from raydfkd.config.load import load_recipe
from raydfkd.job import open_job

pytestmark = pytest.mark.cluster

JOB = Path(__file__).parents[2] / "jobs" / "chaos.yaml"
SETTINGS = (
    "transfer_set.images_per_class=60",
    "synthesis={synthesizer: 'patient:Patient', pause: 0.2, objective: [cross_entropy]}",
    "distill.source.wait_for=400",
    "runtime.workers={min: 0, max: 1}",
    "runtime.cpus_per_worker=0",
    "runtime.resources_per_worker={slot: 1}",
    "runtime.cpus_per_student_worker=0",
    "runtime.resources_per_student_worker={slot: 1}",
)


PATH = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
"""With the synthesizer of these trials in it."""


class Run:
    """The command, and its report."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        arguments = [*COMMAND, "run", str(JOB), "--run-dir", str(folder), "--json"]
        arguments += [part for setting in SETTINGS for part in ("--set", setting)]
        self.job = open_job(load_recipe(JOB, SETTINGS, str(folder)))
        self._log = (folder.parent / "log").open("w+")
        self._driver = subprocess.Popen(
            arguments, env=environment, stdout=subprocess.PIPE, stderr=self._log, text=True, start_new_session=True
        )

    def wait_for(self, what: str, is_there) -> None:
        until = time.monotonic() + 180
        while not is_there():
            assert self._driver.poll() is None, self.said()
            assert time.monotonic() < until, f"{what} did not come; {self.said()}"
            time.sleep(0.2)

    def said(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def report(self) -> dict:
        try:
            output, _ = self._driver.communicate(timeout=400)
        finally:
            self._driver.kill()
        assert self._driver.returncode == 0, self.said()[-3000:]
        found: dict = json.loads(output)
        assert found["units"]["committed"] == len(self.job.units)
        return found


def test_images_come_first_where_the_only_machine_joins_late(tmp_path):
    with cluster(PYTHONPATH=PATH) as (nodes, environment):
        run = Run(tmp_path / "run", environment)
        run.wait_for("the line", lambda: "there is no room for its training and for synthesis at once" in run.said())
        nodes.add(slot=1)
        run.report()


def test_training_gives_its_room_to_the_synthesis_that_lost_its_own(tmp_path):
    with cluster(PYTHONPATH=PATH) as (nodes, environment):
        both = [nodes.add(slot=1), nodes.add(slot=1)]
        run = Run(tmp_path / "run", environment)
        run.wait_for("a commit", run.job.transfer_set.committed)
        run.wait_for("the training", lambda: processes(environment, b"ray::RayTrainWorker"))
        nodes.kill(next(node for node in both if workers_of(node, environment, b"ray::SynthesisActor")))
        run.report()
        assert "gives its room to the synthesis" in run.said()
