"""What a cluster can never hold is refused where it was started here, and said elsewhere."""

from __future__ import annotations

import pytest
from small import small_recipe
from toy import quiet_events, synthesize_here

from raydfkd.errors import RecipeError
from raydfkd.job import Job, open_job
from raydfkd.networks.teacher import open_teacher

pytestmark = pytest.mark.ray


@pytest.fixture
def said() -> list[str]:
    return []


def job_of(folder, *settings) -> Job:
    return open_job(small_recipe(folder, *settings))


def check(job: Job, said: list[str], **parts: bool) -> None:
    from raydfkd.distributed.room import check_room

    check_room(job, lambda topic, text: said.append(f"{topic}: {text}"), **parts)


def elsewhere(monkeypatch) -> None:
    """As on a cluster that others started, which nodes may join."""
    monkeypatch.setattr("raydfkd.distributed.room.is_own_cluster", lambda: False)


NEVER = {
    "runtime.cpus_per_worker=8": "runtime.cpus_per_worker is 8, but Ray, which was started here, has 4 CPUs; give at "
    "most 4, or join a cluster that has it with runtime.address",
    "runtime.gpus_per_worker=1": "runtime.gpus_per_worker is 1, but Ray, which was started here, has 0 GPUs; give 0, ",
    "runtime.resources_per_worker={synth: 1}": "runtime.resources_per_worker.synth is 1, but Ray, which was started "
    "here, has 0 of 'synth'; give none, ",
    "runtime.cpus_per_student_worker=5": "runtime.cpus_per_student_worker is 5, but Ray, ",
    "runtime.gpus_per_student_worker=1": "runtime.gpus_per_student_worker is 1, but Ray, which was started here, has 0",
    "runtime.resources_per_student_worker={train: 1}": "runtime.resources_per_student_worker.train is 1, but Ray, ",
    "runtime.student_workers={min: 5, max: 5}": "runtime.student_workers.min is 5, but Ray has 4 CPUs and 0 GPUs, room "
    "for 4; give at most 4, or join a larger cluster with runtime.address",
}


@pytest.mark.parametrize(("setting", "message"), NEVER.items(), ids=list(NEVER))
def test_what_never_has_room_on_a_cluster_of_its_own_is_refused(ray_cluster, tmp_path, said, setting, message):
    with pytest.raises(RecipeError) as error:
        check(job_of(tmp_path, setting), said)
    assert str(error.value).startswith(message)
    assert said == []


def test_only_what_is_about_to_run_needs_room(ray_cluster, tmp_path, said):
    check(job_of(tmp_path / "a", "runtime.gpus_per_student_worker=1"), said, training=False)
    check(job_of(tmp_path / "b", "runtime.gpus_per_worker=1"), said, synthesis=False)
    assert said == []


def test_synthesis_that_is_done_needs_no_room(ray_cluster, tmp_path, said):
    small = ("transfer_set.images_per_class=4", "synthesis.steps=4")
    done = job_of(tmp_path, *small)
    synthesize_here(done, quiet_events(tmp_path))
    check(job_of(tmp_path, *small, "runtime.gpus_per_worker=1"), said)


ELSEWHERE = {
    "runtime.gpus_per_worker=1": "workers: runtime.workers.max is 2, but Ray has 4 CPUs and 0 GPUs, room for 0; they "
    "wait for nodes to join",
    "runtime.workers.max=64": "workers: runtime.workers.max is 64, but Ray has 4 CPUs and 0 GPUs, room for 8; the "
    "others wait for nodes to join",
    "runtime.gpus_per_student_worker=1": "student: runtime.student_workers.min is 1, but Ray has 4 CPUs and 0 GPUs, "
    "room for 0; the training waits for nodes to join",
}


@pytest.mark.parametrize(("setting", "message"), ELSEWHERE.items(), ids=list(ELSEWHERE))
def test_what_has_no_room_elsewhere_is_said_and_waits(ray_cluster, tmp_path, monkeypatch, said, setting, message):
    elsewhere(monkeypatch)
    check(job_of(tmp_path, setting), said)
    assert said == [message]


def test_room_is_counted_node_by_node():
    from raydfkd.distributed.room import _room

    two_small = [{"CPU": 1.0}, {"CPU": 1.0}]
    assert _room(two_small, {"CPU": 2.0}) == 0
    assert _room(two_small, {"CPU": 0.5, "GPU": 0.0}) == 4
    assert _room([{"CPU": 0.3}], {"CPU": 0.1}) == 3
    assert _room(two_small, {"CPU": 0.0}) == float("inf")


def turns(job: Job, said: list[str]) -> bool:
    from raydfkd.distributed.room import must_take_turns

    return must_take_turns(job, lambda topic, text: said.append(text))


@pytest.mark.parametrize(("cpus", "in_turns"), [(1, False), (3, False), (3.5, False), (4, True)])
def test_synthesis_and_training_take_turns_where_both_do_not_fit_at_once(ray_cluster, tmp_path, said, cpus, in_turns):
    job = job_of(tmp_path, f"runtime.cpus_per_student_worker={cpus}")  # beside half a CPU for an actor
    assert turns(job, said) == in_turns
    assert len(said) == in_turns


def test_synthesis_that_asks_the_student_cannot_take_turns_with_it(ray_cluster, tmp_path, said):
    against = "synthesis.objective=[{term: cross_entropy}, {term: competition}]"
    with pytest.raises(RecipeError, match="this objective asks the student while it is trained"):
        turns(job_of(tmp_path, "runtime.cpus_per_student_worker=4", against), said)


@pytest.mark.cluster
def test_run_in_turns_makes_the_set_and_the_student(ray_cluster, tmp_path):
    from raydfkd.distributed.executor import RayExecutor

    settings = ("transfer_set.images_per_class=4", "synthesis.steps=4", "runtime.cpus_per_student_worker=4")
    job = job_of(tmp_path, *settings)
    outcome, student = RayExecutor().run(job, open_teacher(job.recipe), quiet_events(tmp_path))
    assert job.snapshot().images == job.planned_images
    assert student
    assert outcome.attempted == len(job.units)


def test_refusal_comes_before_any_image_is_made(ray_cluster, tmp_path):
    from raydfkd.distributed.executor import RayExecutor

    job = job_of(tmp_path, "runtime.gpus_per_student_worker=1")
    with pytest.raises(RecipeError, match="gpus_per_student_worker is 1"):
        RayExecutor().run(job, open_teacher(job.recipe), quiet_events(tmp_path))
    assert job.transfer_set.committed() == set()
