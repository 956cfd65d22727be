"""When a Train job is given up."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from small import small_recipe

from raydfkd.job import open_job
from raydfkd.networks.teacher import open_teacher
from raydfkd.runner.events import Events
from raydfkd.runner.progress import Display
from raydfkd.store.errors import OutageError

pytestmark = pytest.mark.ray


class Failures:
    """A policy that allows five failures in a row, and a coordinator that it tells."""

    def __init__(self) -> None:
        import ray
        from ray.train.v2.api.config import FailureConfig

        from raydfkd.distributed.scaling import FailuresInARow
        from raydfkd.distributed.train_driver import new_coordinator

        self._get = ray.get
        self._coordinator = new_coordinator()
        self._policy = FailuresInARow(FailureConfig(max_failures=5, max_preemption_failures=-1), self._coordinator)

    def reach(self, step: int) -> None:
        """Let the training get on to ``step``."""
        self._get(self._coordinator.pin.remote({"step": step}))

    def decide(self, *raised: Exception | None) -> str:
        """What is done after ``raised`` on the ranks, None for a rank that was lost."""
        from ray.train.v2.api.exceptions import WorkerGroupError

        from raydfkd.distributed.ray_internals import WorkerHealthCheckFailedError

        lost = WorkerHealthCheckFailedError("...", failure=RuntimeError("the actor died"))
        failures = {rank: lost if error is None else error for rank, error in enumerate(raised)}
        return str(self._policy.make_decision(WorkerGroupError("...", failures)).name)

    def lines(self) -> list[str]:
        found: list[str] = self._get(self._coordinator.take.remote()).lines
        return found


def test_error_of_the_workers_code_that_comes_back_at_the_same_step_is_not_tried_again(ray_cluster):
    failures = Failures()
    failures.reach(500)
    assert failures.decide(IndexError("index 7 is out of range")) == "RETRY"
    assert failures.lines() == [
        "a worker failed: IndexError: index 7 is out of range (after step 500); trying again from the newest "
        "checkpoint, 1 of 5 times"
    ]
    failures.reach(400)
    failures.reach(500)
    assert failures.decide(IndexError("index 7 is out of range")) == "RAISE"
    assert failures.lines() == []


def test_another_error_or_another_step_is_tried_again(ray_cluster):
    failures = Failures()
    assert failures.decide(IndexError("index 7 is out of range")) == "RETRY"
    assert failures.decide(IndexError("index 8 is out of range")) == "RETRY"
    failures.reach(100)
    assert failures.decide(IndexError("index 8 is out of range")) == "RETRY"


@pytest.mark.parametrize("raised", [(None,), (RuntimeError("Connection closed by peer"), None), (OutageError("s3"),)])
def test_lost_workers_and_a_store_that_is_away_are_tried_again_as_often_as_allowed(ray_cluster, raised):
    failures = Failures()
    assert [failures.decide(*raised) for _ in range(6)] == ["RETRY"] * 5 + ["RAISE"]
    assert len(failures.lines()) == 5


@pytest.mark.cluster
def test_student_that_fails_for_a_reason_of_its_own_ends_its_run_with_that_error(ray_cluster, tmp_path):
    from raydfkd.distributed.executor import RayExecutor

    settings = ("transfer_set.images_per_class=8", "synthesis.steps=4", "distill.steps=1000", "distill.batch_size=8")
    student = ("student.network=deadly:build_failing", "student.options={at: 30}")
    job = open_job(small_recipe(tmp_path, *settings, *student))
    console = Console(file=io.StringIO(), width=500)
    events = Events(Display(console))
    with pytest.raises(IndexError, match="index 7 is out of range"):
        RayExecutor().run(job, open_teacher(job.recipe), events)
    said = console.file.getvalue()
    assert said.count("a worker failed: IndexError: index 7 is out of range (after step 20)") == 1
