"""The real thing, once: actors and a Train job on a local Ray, with a worker killed in the middle."""

import io
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from clusters import kill_one_at_work
from rich.console import Console
from small import small_recipe
from toy import fresh_student_of, quiet_events, synthesize_here

from raydfkd.cli import main
from raydfkd.data.commits import Commit
from raydfkd.job import open_job
from raydfkd.networks.teacher import open_teacher
from raydfkd.report.metrics import MetricsLog, read_metrics
from raydfkd.runner.events import Events, Listener, MetricsWriter
from raydfkd.runner.progress import Display
from raydfkd.runner.run import announce

pytestmark = pytest.mark.ray

SECRET = "moon-shaped-password"


class KillsAWorkerAfterTheFirstCommit(Listener):
    """A spot machine that goes away under a unit."""

    killed: int | None = None
    _killer: threading.Thread | None = None

    def committed(self, commit: Commit, *, running: int) -> None:
        if self._killer is None:
            self._killer = threading.Thread(target=self._kill_one, daemon=True)
            self._killer.start()

    def _kill_one(self) -> None:
        self.killed = kill_one_at_work(os.environ)  # where one worker is all there is yet, it is between two units now


def test_a_run_survives_a_killed_worker_makes_the_set_that_one_process_makes_and_is_not_done_twice(
    ray_cluster, short_evidence, tmp_path, monkeypatch, capsys
):
    import ray

    from raydfkd.distributed.executor import RayExecutor

    job = open_job(small_recipe(tmp_path / "ray", f"transfer_set.storage_options={{token: {SECRET}}}"))
    metrics = tmp_path / "metrics.jsonl"
    console = Console(file=io.StringIO())
    teacher, killer = open_teacher(job.recipe), KillsAWorkerAfterTheFirstCommit()
    with Display(console) as display:
        events = Events(MetricsWriter(MetricsLog(metrics, fresh=True)), display, killer)
        announce(job, events)
        outcome, student = RayExecutor().run(job, teacher, events)
    assert killer.killed is not None
    assert "worker lost" in console.file.getvalue()
    assert job.transfer_set.committed() == job.unit_ids
    assert outcome.attempted >= len(job.units) + 1
    assert outcome.given_up == ()

    committed = [entry["unit"] for entry in read_metrics(metrics) if entry["event"] == "unit"]
    assert sorted(committed) == sorted(job.unit_ids)

    alone = open_job(small_recipe(tmp_path / "local"))
    synthesize_here(alone, quiet_events(tmp_path / "local"))
    assert alone.snapshot().content_digest() == job.snapshot().content_digest()

    steps = [entry["step"] for entry in read_metrics(metrics) if entry["event"] == "student"]
    assert steps == [1, 10, 20, 30, 40]
    fresh = fresh_student_of(job).state_dict()
    assert student.keys() == fresh.keys()
    assert any(not torch.equal(student[name], fresh[name]) for name in fresh)

    session = Path(ray._private.worker._global_node.get_session_dir_path())
    for written in [*session.glob("logs/**/*"), *(tmp_path / "ray").rglob("*")]:
        assert not written.is_file() or SECRET.encode() not in written.read_bytes(), f"{written} tells the secret"

    again = tmp_path / "again.yaml"
    again.write_text(json.dumps(job.recipe.model_dump(mode="json")))
    monkeypatch.setattr("sys.argv", ["raydfkd", "run", str(again), "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["units"] == {"planned": 12, "committed": 12, "attempted": 0, "quarantined": 0}
    assert report["content_digest"] == job.snapshot().content_digest()
    assert report["student"]["top1"] is None
    assert 0 <= report["agreement"] <= 1
    saved = safetensors.torch.load_file(job.recipe.run_dir + "/student.safetensors")
    assert all(torch.equal(saved[name], student[name]) for name in student)


class Says(Listener):
    """Notes what a run says, and the steps of its student."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[float] = []

    def say(self, topic: str, text: str) -> None:
        self.lines.append(text)

    def student(self, entry: Mapping[str, float]) -> None:
        self.steps.append(entry["step"])


@pytest.mark.cluster
def test_damage_that_two_training_workers_find_restarts_neither(ray_cluster, tmp_path):
    """More damaged parts than a group of workers may fail in a row."""
    from raydfkd.distributed.executor import RayExecutor

    job = open_job(small_recipe(tmp_path, "runtime.student_workers={min: 2, max: 2}", "distill.batch_size=40",
                                "distill.holdout=0", "runtime.cpus_per_student_worker=0.5"))  # fmt: skip
    synthesize_here(job, quiet_events(tmp_path))
    commits = job.snapshot().commits
    broken = commits[: job.recipe.runtime.max_losses + 3]
    for commit in broken:
        for part in commit.parts:
            job.transfer_set.store.put(part.path, b"damaged")
    says = Says()
    student = RayExecutor().distill(job, job.phases[0], open_teacher(job.recipe), Events(says))
    assert student
    assert says.steps[-1] == 40
    assert not [line for line in says.lines if "fail" in line or "resume" in line or "again" in line]
    assert job.transfer_set.damaged() == {commit.unit for commit in broken}
    assert job.snapshot().commits == commits[len(broken) :]


def test_a_mistake_that_only_a_worker_can_see_reaches_the_user_as_it_is(ray_cluster, tmp_path):
    from raydfkd.distributed.executor import RayExecutor
    from raydfkd.errors import RecipeError

    job = open_job(small_recipe(tmp_path))
    teacher = open_teacher(job.recipe)
    elsewhere = job.recipe.teacher.model_copy(update={"weights": "/on/the/head.pt"})
    job = replace(job, recipe=job.recipe.model_copy(update={"teacher": elsewhere}))
    with pytest.raises(RecipeError, match=r"teacher.weights is '/on/the/head.pt': no such file"):
        RayExecutor().synthesize(job, job.phases[0], teacher, Events())


def test_weights_that_changed_under_a_run_stop_its_workers(ray_cluster, tmp_path):
    from raydfkd.distributed.executor import RayExecutor
    from raydfkd.errors import RecipeError
    from raydfkd.job import job_of

    recipe = small_recipe(tmp_path)
    job = job_of(recipe, recipe.made_of("0" * 64))
    with pytest.raises(RecipeError, match="not the weights that this run began with"):
        RayExecutor().synthesize(job, job.phases[0], open_teacher(job.recipe), Events())
    assert job.transfer_set.committed() == set()


class PrintsAsRayDoes(Listener):
    def synthesis_started(self) -> None:
        print("(raylet) The node with node id 1 has been marked dead")  # noqa: T201 - that is the point


@pytest.mark.cluster
def test_what_ray_prints_is_not_on_standard_output(ray_cluster, tmp_path, capsys):
    from raydfkd.distributed.executor import RayExecutor

    job = open_job(small_recipe(tmp_path, "transfer_set.images_per_class=4", "synthesis.steps=4"))
    RayExecutor().synthesize(job, job.phases[0], open_teacher(job.recipe), Events(PrintsAsRayDoes()))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "marked dead" in printed.err
