"""The pool on a local Ray: what it requests, gives back, and how it ends."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from clusters import processes
from small import small_recipe
from toy import quiet_events, synthesize_here

from raydfkd.data.commits import Commit, Part
from raydfkd.errors import RecipeError, RunError
from raydfkd.job import Job, open_job
from raydfkd.runner.events import Events, Listener
from raydfkd.runner.signals import Interruption
from raydfkd.store.errors import OutageError

pytestmark = pytest.mark.ray

TINY = "synthesis.generator={kind: conv, latent: 4, width: 2, doublings: 1}"
LONG_UNITS = (TINY, "synthesis.steps=1500", "transfer_set.unit={classes: 10, images_per_class: 24}")


def job_of(folder, *settings):
    job = open_job(small_recipe(folder, *settings))
    job.transfer_set.create()
    return job


def pool_of(job, *listeners):
    from raydfkd.distributed.pool import SynthesisPool  # noqa: PLC0415 - imports Ray

    return SynthesisPool(job, Events(*listeners))


class Hears(Listener):
    """Keeps what is said, and how far units in work have come."""

    def __init__(self):
        self.said, self.progress, self.order, self.lost_for = [], [], [], []

    def say(self, topic, text):
        self.said.append(text)

    def progressed(self, progress):
        self.progress.append(progress)
        self.order.append("progressed")

    def committed(self, commit, *, running):
        self.order.append("committed")

    def lost(self, unit, reason):
        self.lost_for.append(reason)


@pytest.mark.cluster
def test_actors_without_a_unit_are_ended_when_the_queue_drains(ray_cluster, tmp_path):
    job = job_of(tmp_path, "runtime.workers={min: 0, max: 3}", "runtime.cpus_per_worker=0.1",
                 "transfer_set.images_per_class=8", "synthesis.steps=200", TINY)  # fmt: skip
    queue, seen = job.begin_synthesis(), []
    pool = pool_of(job)
    pool.run(queue, lambda: seen.append((queue.num_open, len(list(pool._workers())))), Interruption())
    assert max(actors for _, actors in seen) == 3
    assert all(actors <= num_open for (num_open, _), (_, actors) in itertools.pairwise(seen))
    assert job.snapshot().images == job.planned_images


@pytest.mark.cluster
def test_units_in_work_say_how_far_they_are_and_every_look_at_their_objective(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("raydfkd.distributed.pool.PROGRESS_S", 0.0)
    job = job_of(tmp_path, TINY, "synthesis.steps=300", "synthesis.emissions=1",
                 "transfer_set.unit={classes: 10, images_per_class: 24}")  # fmt: skip
    hears = Hears()
    pool_of(job, hears).run(job.begin_synthesis(), lambda: None, Interruption())
    assert {(progress.unit, progress.steps) for progress in hears.progress} == {(job.units[0].id, 300)}
    steps = [progress.step for progress in hears.progress]
    assert steps == sorted(steps)
    looks = [progress.objective["step"] for progress in hears.progress if progress.objective]
    assert looks == [1, 50, 100, 150, 200, 250, 300]
    assert hears.order[-1] == "committed", "nothing is said of a unit that is done"


@pytest.mark.cluster
def test_no_more_actors_are_requested_than_there_are_units(ray_cluster, tmp_path):
    job = job_of(tmp_path, "runtime.workers={min: 0, max: 50}", "runtime.cpus_per_worker=0.1",
                 "transfer_set.images_per_class=4")  # fmt: skip
    queue, seen = job.begin_synthesis(), []
    pool = pool_of(job)
    pool.run(queue, lambda: seen.append(len(list(pool._workers()))), Interruption())
    assert max(seen) <= 2


@pytest.mark.cluster
def test_interrupted_unit_is_left_and_goes_on_to_the_same_set(ray_cluster, tmp_path, monkeypatch):
    from raydfkd.distributed import pool as pool_module  # noqa: PLC0415 - imports Ray

    alone = job_of(tmp_path / "alone", *LONG_UNITS)
    synthesize_here(alone, quiet_events(tmp_path / "alone"))
    monkeypatch.setattr(pool_module, "FINISH_S", 0.0)
    job = job_of(tmp_path / "ray", *LONG_UNITS)
    queue, pool = job.begin_synthesis(), pool_of(job)
    began = []

    def interrupt_once_it_works():
        if pool._busy() and not began:
            began.append(time.monotonic())
            threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGINT)).start()

    with Interruption() as interruption, pytest.raises(KeyboardInterrupt):
        pool.run(queue, interrupt_once_it_works, interruption)
    assert time.monotonic() - began[0] < 2 + pool_module.LEAVE_S
    assert job.transfer_set.committed() == set()
    assert job.transfer_set.store.list("resume") == [f"resume/{job.units[0].id}.pt"]
    pool_of(job).run(job.begin_synthesis(), lambda: None, Interruption())
    assert job.snapshot().content_digest() == alone.snapshot().content_digest()


@pytest.mark.cluster
def test_actor_that_gets_sigterm_leaves_its_unit_to_another(ray_cluster, tmp_path):
    job = job_of(tmp_path, *LONG_UNITS)
    queue, pool, told = job.begin_synthesis(), pool_of(job), []
    steps_before = []

    def terminate_once_it_works():
        # Whether it works is asked of the queue: while an actor is asked how far it is, its title does not say so.
        actors = processes(os.environ, b"ray::SynthesisActor") if queue.num_running else []
        if actors and not told:
            told.append(actors[0])
            threading.Timer(1.5, os.kill, (actors[0], signal.SIGTERM)).start()
        steps_before.extend(job.transfer_set.store.list("resume"))

    pool.run(queue, terminate_once_it_works, Interruption())
    assert told
    assert steps_before
    assert queue.attempted == 2
    (commit,) = job.snapshot().commits
    assert commit.attempt == 1


@pytest.mark.cluster
def test_workers_that_die_while_they_are_built_end_the_run(ray_cluster, tmp_path, monkeypatch):
    job = job_of(tmp_path, "teacher.network=deadly:build", "teacher.options={}")
    with pytest.raises(RecipeError, match=r"runtime.workers: 5 in a row died while they were built"):
        pool_of(job).run(job.begin_synthesis(), lambda: None, Interruption())


def stubbed(monkeypatch, job, folder, **acts):
    """Let the pool work with actors that only pretend to."""
    import ray  # noqa: PLC0415 - takes time that other tests need not spend
    from stub import StubActor  # noqa: PLC0415 - imports Ray

    records = {unit.id: commit_of(unit).to_json() for unit in job.units}
    actor = ray.remote(concurrency_groups={"control": 1})(StubActor)
    options = {"num_cpus": job.recipe.runtime.cpus_per_worker, "max_restarts": 0}
    new_actor = lambda pool: actor.options(**options).remote(records, {"folder": str(folder), **acts})  # noqa: E731
    monkeypatch.setattr("raydfkd.distributed.pool.SynthesisPool._new_actor", new_actor)


def commit_of(unit):
    path, digest = f"parts/{unit.id}.parquet", "0" * 32
    part = Part(path=path, rows=unit.request.count, bytes=10000, xxh3=digest)
    return Commit(unit=unit.id, attempt=1, seed=0, images=unit.request.count, parts=(part,), content=digest,
                  objective=0.0, student_version=-1, seconds=0.1)  # fmt: skip


@pytest.mark.cluster
def test_machine_on_which_no_worker_can_be_built_does_not_end_a_run_that_has_another(
    ray_cluster, tmp_path, monkeypatch
):
    job = job_of(tmp_path, "runtime.workers={min: 0, max: 2}")
    stubbed(monkeypatch, job, tmp_path, builds=1, seconds=0.4)
    hears, queue = Hears(), job.begin_synthesis()
    pool_of(job, hears).run(queue, lambda: None, Interruption())
    assert hears.order.count("committed") == len(job.units)
    assert (tmp_path / "built-2").exists()
    assert hears.said == ["one could not be built; trying again (CUDA error: unspecified launch failure)"]


def test_mistake_that_every_worker_meets_ends_the_run(ray_cluster, tmp_path, monkeypatch):
    job = job_of(tmp_path, "runtime.workers={min: 0, max: 2}")
    stubbed(monkeypatch, job, tmp_path, builds=0)
    with pytest.raises(RuntimeError, match="CUDA error"):
        pool_of(job).run(job.begin_synthesis(), lambda: None, Interruption())


def test_failure_that_is_the_same_for_every_unit_ends_the_run_after_a_few(ray_cluster, tmp_path, monkeypatch):
    job = job_of(tmp_path)
    stubbed(monkeypatch, job, tmp_path, is_disk_full=True)
    queue = job.begin_synthesis()
    with pytest.raises(RunError, match=r"5 units in a row failed alike .*No space left on device\); mend that, and"):
        pool_of(job).run(queue, lambda: None, Interruption())
    assert queue.attempted < len(job.units) == 12
    assert queue.given_up == ()


@pytest.mark.parametrize("is_stopped", [False, pytest.param(True, marks=pytest.mark.cluster)])
def test_worker_that_hangs_loses_its_unit_to_another_and_is_ended(ray_cluster, tmp_path, monkeypatch, is_stopped):
    monkeypatch.setattr("raydfkd.distributed.patience.LEAST_S", 1.0)
    monkeypatch.setattr("raydfkd.distributed.patience.TIMES", 0.0)  # or the load of this machine would decide
    monkeypatch.setattr("raydfkd.distributed.pool.PROGRESS_S", 0.2)
    job = job_of(tmp_path, "runtime.workers={min: 0, max: 2}", "transfer_set.images_per_class=8")
    stubbed(monkeypatch, job, tmp_path, hang_at=job.units[1].id, seconds=0.8)
    hears, pid = Hears(), tmp_path / "pid"

    def stop_it():
        if is_stopped and pid.exists():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid.read_text()), signal.SIGSTOP)

    queue = job.begin_synthesis()
    pool_of(job, hears).run(queue, stop_it, Interruption())
    assert hears.order.count("committed") == len(job.units)
    assert [reason for reason in hears.lost_for if "another worker makes it too" in reason]
    assert queue.given_up == ()
    assert_ended(int(pid.read_text()))


def assert_ended(process):
    until = time.monotonic() + 60
    while Path(f"/proc/{process}").exists() and Path(f"/proc/{process}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < until, "it still holds its machine's resources"
        time.sleep(0.1)


@pytest.mark.cluster
def test_store_that_is_out_of_reach_costs_no_attempt(ray_cluster, tmp_path, monkeypatch):
    (tmp_path / "told").touch()
    job = job_of(tmp_path, "teacher.network=deadly:build_cut_off", f"teacher.options={{told: {tmp_path / 'told'}}}",
                 TINY, "transfer_set.images_per_class=4", "runtime.max_attempts=1")  # fmt: skip
    news, calls = Job.news, []

    def cut_off(job, *, at_once=False):
        calls.append(time.monotonic())
        if len(calls) < 3:
            raise OutageError("s3://bucket/set/commits cannot be listed (timed out; tried again and again)")
        return news(job, at_once=at_once)

    monkeypatch.setattr(Job, "news", cut_off)
    monkeypatch.setattr("raydfkd.distributed.lookout.LOOK_EVERY_S", 0.1)
    hears = Hears()
    pool, queue = pool_of(job, hears), job.begin_synthesis()
    pool.run(queue, lambda: None, Interruption())
    assert len(calls) >= 3
    assert (tmp_path / "told").read_text() == "xxx"
    assert queue.given_up == ()
    assert job.snapshot().images == job.planned_images
    assert sum("going on as soon as it can" in text for text in hears.said) == 1


@pytest.mark.cluster
def test_store_that_stays_out_of_reach_ends_the_run(ray_cluster, tmp_path, monkeypatch):
    (tmp_path / "told").touch()
    job = job_of(tmp_path, "teacher.network=deadly:build_cut_off", f"teacher.options={{told: {tmp_path / 'told'}}}")
    monkeypatch.setattr("raydfkd.runner.setbacks.OUTAGE_S", 0.0)
    with pytest.raises(OutageError, match="x.parquet cannot be written"):
        pool_of(job).run(job.begin_synthesis(), lambda: None, Interruption())


@pytest.mark.cluster
def test_units_that_others_commit_are_not_made_again(ray_cluster, tmp_path, monkeypatch):
    """Two drivers of one recipe: what one has committed the other finds."""

    monkeypatch.setattr("raydfkd.distributed.lookout.LOOK_EVERY_S", 0.0)
    job = job_of(tmp_path, "runtime.workers={min: 0, max: 1}")
    queue = job.begin_synthesis()
    other = threading.Thread(target=lambda: synthesize_here(job, quiet_events(tmp_path)))
    other.start()
    pool_of(job).run(queue, lambda: None, Interruption())
    other.join()
    assert queue.attempted < len(job.units)
    assert job.transfer_set.committed() == job.unit_ids
    assert job.snapshot().images == job.planned_images
