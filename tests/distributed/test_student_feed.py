"""The student inside the synthesis on Ray: published by the training, followed by the workers, in rounds or at once."""

from __future__ import annotations

import os
import threading
import time

import pyarrow.parquet as pq
import pytest
import torch
from clusters import kill_one_at_work
from small import small_recipe
from toy import quiet_events, run_here

from raydfkd.data.student_versions import StudentVersions
from raydfkd.job import open_job
from raydfkd.networks.teacher import open_teacher
from raydfkd.runner.events import Events, Listener

COMPETITION = "synthesis.objective=[cross_entropy, {term: bn_moments, form: norm}, {term: competition, weight: 5}]"
PUBLISH_EVERY, STEPS = 5, 40
AT_ONCE = (
    COMPETITION,
    "synthesis.emissions=4",
    "synthesis.student_refresh=10",
    f"distill.steps={STEPS}",
    f"distill.publish_every={PUBLISH_EVERY}",
)
IN_ROUNDS = (COMPETITION, "rounds=2", "transfer_set.images_per_class=16")


class Watching(Listener):
    """Notes beside each commit the highest version that was published by then."""

    def __init__(self, job):
        self._job = job
        self.seen = []

    def committed(self, commit, *, running):
        self.seen.append((commit, self.published()))

    def published(self):
        return max(StudentVersions(self._job.transfer_set.store).versions(), default=-1)


class WaitsForTheStudent(Watching):
    """Hands out the second half of the units once the training, which takes its time to start, has published."""

    def committed(self, commit, *, running):
        super().committed(commit, running=running)
        deadline = time.monotonic() + 300
        while len(self.seen) == len(self._job.units) // 2 and not self.published() > 0:
            assert time.monotonic() < deadline, "no version came"
            time.sleep(0.1)


class KillsAWorkerInTheSecondRound(Watching):
    """A machine that goes away under a unit that is judged against the student of the first round."""

    killed: int | None = None
    _killer: threading.Thread | None = None

    def committed(self, commit, *, running):
        super().committed(commit, running=running)
        if self._killer is None and commit.student_version >= 0:
            self._killer = threading.Thread(target=self._kill_one, daemon=True)
            self._killer.start()

    def _kill_one(self):
        self.killed = kill_one_at_work(os.environ)


def versions_in(job, commit):
    store = job.transfer_set.store
    tables = [pq.read_table(f"{store.uri}/{part.path}", columns=["student_version"]) for part in commit.parts]
    return [value for table in tables for value in table["student_version"].to_pylist()]


def run_on_ray(job, listener):
    from raydfkd.distributed.executor import RayExecutor

    return RayExecutor().run(job, open_teacher(job.recipe), Events(listener))


def alone(folder):
    """The set and the student that one process makes."""
    job = open_job(small_recipe(folder, *IN_ROUNDS, "runtime.executor=local"))
    _, student = run_here(job, quiet_events(folder))
    return job, student


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return alone(tmp_path_factory.mktemp("alone"))


@pytest.mark.cluster
def test_workers_follow_the_student_that_is_trained_beside_them(ray_cluster, tmp_path):
    job = open_job(small_recipe(tmp_path, *AT_ONCE))
    watching = WaitsForTheStudent(job)
    outcome, student = run_on_ray(job, watching)
    assert outcome.given_up == ()
    assert job.transfer_set.committed() == job.unit_ids
    recorded = [(versions_in(job, commit), published) for commit, published in watching.seen]
    assert max(recorded[0][0]) <= 0, "before there are images there is nothing to train on"
    assert max(recorded[-1][0]) > 0
    for versions, published in recorded:
        assert versions == sorted(versions)
        assert max(versions) <= published
        assert {version for version in versions if version % PUBLISH_EVERY} <= {-1}
    newest = StudentVersions(job.transfer_set.store).newest()
    assert newest is not None
    assert newest[0] == STEPS
    assert all(torch.equal(newest[1][name], value) for name, value in student.items())


@pytest.mark.cluster
def test_rounds_on_ray_make_the_set_and_the_student_that_one_process_makes(ray_cluster, tmp_path, undisturbed):
    expected, expected_student = undisturbed
    job = open_job(small_recipe(tmp_path, *IN_ROUNDS))
    assert job.digest == expected.digest
    watching = Watching(job)
    _, student = run_on_ray(job, watching)
    assert {commit.student_version for commit, _ in watching.seen} == {-1, STEPS // 2}
    assert job.snapshot().content_digest() == expected.snapshot().content_digest()
    assert all(torch.equal(expected_student[name], value) for name, value in student.items())


@pytest.mark.cluster
def test_worker_killed_in_the_second_round_changes_nothing(ray_cluster, tmp_path, undisturbed):
    expected, expected_student = undisturbed
    job = open_job(small_recipe(tmp_path, *IN_ROUNDS))
    watching = KillsAWorkerInTheSecondRound(job)
    outcome, student = run_on_ray(job, watching)
    assert watching.killed is not None
    assert outcome.attempted > len(job.units)
    assert job.snapshot().content_digest() == expected.snapshot().content_digest()
    assert all(torch.equal(expected_student[name], value) for name, value in student.items())
