"""A training whose nodes are killed, drained and added: how long it stands still, and what it goes on from.

Run by make test-cluster; about three minutes.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clusters import Nodes, cluster
from small import small_recipe
from toy import quiet_events, synthesize_here

from raydfkd.checkpoints import read_checkpoint
from raydfkd.job import open_job
from raydfkd.report.metrics import read_metrics
from raydfkd.units import Phase

pytestmark = pytest.mark.cluster

HERE = Path(__file__).parent
BACK_WITHIN_S = 30
PATIENCE_S = 90.0
NOTICE_S = 8
CHECKPOINT_EVERY = 100


def recipe_file(folder: Path, *, units: int = 2, steps: int = 1_000_000) -> Path:
    """A long training on a set of two units, of which so many are there already."""
    recipe = small_recipe(
        folder / "run",
        "synthesis.steps=10",
        "transfer_set.images_per_class=40",
        "transfer_set.unit={classes: 10, images_per_class: 20}",
        f"distill.steps={steps}",
        f"distill.checkpoint_every={CHECKPOINT_EVERY}",
        "distill.batch_size=32",
        "distill.holdout=0",
        "runtime.device=cpu",
        "runtime.student_workers={min: 1, max: 2}",
        "runtime.cpus_per_student_worker=0.5",
        "runtime.resources_per_student_worker={train: 1}",
    )
    job = open_job(recipe)
    synthesize_here(job, quiet_events(folder / "synthesis"), Phase(units=job.units[:units], until_step=0))
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe.model_dump(mode="json")))
    return path


def first_entry(metrics: Path, is_it: Callable[[dict], bool], *, within_s: float = PATIENCE_S) -> dict:
    """Wait for the first entry of the learning curve that ``is_it``."""
    deadline = time.time() + within_s
    while time.time() < deadline:
        for entry in read_metrics(metrics) if metrics.exists() else []:
            if is_it(entry):
                return entry
        time.sleep(0.2)
    raise AssertionError(
        f"not within {within_s} s: {list(read_metrics(metrics))[-3:] if metrics.exists() else 'no entry'}"
    )


def saved_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints that are there now and whole."""
    steps = []
    for path in run_dir.glob("student-*/checkpoint_*/state.pt"):
        with contextlib.suppress(OSError, ValueError):  # just written, or about to be replaced
            steps.append(read_checkpoint(path.read_bytes())["trainer"]["step"])
    return steps


@contextlib.contextmanager
def driver(recipe: Path, folder: Path, nodes: Nodes, environment: dict[str, str]) -> Iterator[None]:
    """A process that trains meanwhile, and is killed then."""
    arguments = [str(recipe), str(folder / "run"), nodes.address, str(folder / "metrics.jsonl")]
    process = subprocess.Popen(
        [sys.executable, str(HERE / "train_driver.py"), *arguments],
        env=environment,
        stdout=(folder / "driver.out").open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def saved_until(end: float, run_dir: Path) -> set[int]:
    """Steps of the checkpoints that are there at any time until then."""
    saved = set()
    while time.time() < end:
        saved.update(saved_steps(run_dir))
        time.sleep(0.1)
    return saved


def test_a_training_is_back_soon_after_a_kill_and_a_drain_and_takes_in_a_node_that_joins(tmp_path):
    recipe, metrics = recipe_file(tmp_path), tmp_path / "metrics.jsonl"

    def next_with(workers: int, *, after: float, step: int = 0) -> dict:
        return first_entry(
            metrics,
            lambda entry: entry["time"] > after and entry["workers"] == workers and entry["step"] >= step,
        )

    timeline = {}
    with cluster() as (nodes, environment):
        _, second = nodes.add(train=1), nodes.add(train=1)
        started = time.time()
        try:
            with driver(recipe, tmp_path, nodes, environment):
                both = next_with(2, after=started, step=CHECKPOINT_EVERY + 20)
                timeline["start to a step on two workers"] = next(read_metrics(metrics))["time"] - started

                killed = nodes.kill(second)
                alone = next_with(1, after=killed)
                timeline["kill to a step on one worker"] = alone["time"] - killed
                assert alone["step"] > CHECKPOINT_EVERY, "it went on from a checkpoint"

                joined = time.time()
                third = nodes.add(train=1)
                both = next_with(2, after=joined)
                timeline["join to a step on two workers"] = both["time"] - joined
                before = [entry for entry in read_metrics(metrics) if entry["workers"] == 1]
                timeline["steps made twice for it"] = before[-1]["step"] - both["step"]

                announced = nodes.drain(third, seconds=NOTICE_S)
                saved = saved_until(announced + NOTICE_S, tmp_path / "run")
                nodes.kill(third)
                alone = next_with(1, after=announced)
                before = [entry for entry in read_metrics(metrics) if entry["time"] < alone["time"]]
                timeline["drain: last step on two workers to a step on one"] = alone["time"] - before[-1]["time"]
                assert any(step % CHECKPOINT_EVERY for step in saved), "the notice was answered by a checkpoint"
        finally:
            (tmp_path / "timeline.json").write_text(json.dumps(timeline, indent=1))
    assert timeline["kill to a step on one worker"] < BACK_WITHIN_S, timeline
    assert timeline["drain: last step on two workers to a step on one"] < BACK_WITHIN_S, timeline


def test_a_training_that_waits_for_images_saves_when_its_node_is_about_to_go(tmp_path):
    recipe = recipe_file(tmp_path, units=1, steps=600)  # of which half the images are enough for about 150
    with cluster() as (nodes, environment):
        node = nodes.add(train=1)
        with driver(recipe, tmp_path, nodes, environment):
            first_entry(tmp_path / "metrics.jsonl", lambda entry: entry["step"] >= 150)
            time.sleep(3)
            assert saved_steps(tmp_path / "run") == [CHECKPOINT_EVERY]
            (last, *_) = [entry["step"] for entry in reversed(list(read_metrics(tmp_path / "metrics.jsonl")))]
            saved = saved_until(nodes.drain(node, seconds=NOTICE_S) + NOTICE_S, tmp_path / "run")
    assert last <= max(saved) < last + 10, "all steps that were made"
