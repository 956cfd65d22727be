"""Actors beside the workers that a training needs may die, and it goes on."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest
from clusters import processes
from ray.util import placement_group_table
from small import small_recipe

from raydfkd.job import open_job
from raydfkd.networks.teacher import open_teacher
from raydfkd.runner.events import Events, Listener

pytestmark = pytest.mark.cluster


class Kills(Listener):
    """Kills the actor of that kind once the student has made a step after its first checkpoint."""

    def __init__(self, kind: bytes) -> None:
        self._kind = kind
        self.killed: list[int] = []
        self.said: list[str] = []
        self.steps: list[int] = []

    def student(self, entry):
        self.steps.append(entry["step"])
        if not self.killed and entry["step"] > 100:
            self.killed = processes(os.environ, b"ray::" + self._kind)
            for process in self.killed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    def say(self, topic, text):
        self.said.append(text)


@pytest.mark.parametrize("kind", [b"Coordinator", b"TrainController"])
def test_a_training_outlives_the_actors_beside_its_workers(ray_cluster, tmp_path, kind):
    from raydfkd.distributed.executor import RayExecutor

    settings = ("transfer_set.images_per_class=8", "synthesis.steps=4", "distill.steps=3000", "distill.batch_size=8")
    job = open_job(small_recipe(tmp_path, *settings))
    kills = Kills(kind)
    _, student = RayExecutor().run(job, open_teacher(job.recipe), Events(kills))
    assert kills.killed
    assert student
    assert any("an actor that its training needs was lost" in text for text in kills.said)
    assert kills.steps[-1] == 3000
    assert not [group for group in placement_group_table().values() if group["state"] != "REMOVED"], "room is nobody's"
    assert sum(after <= before for before, after in zip(kills.steps, kills.steps[1:], strict=False)) <= 1, "from zero?"
