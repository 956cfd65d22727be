"""A training whose nodes are killed, drained and added: how long it stands still, and what it goes on from.

Run by make test-cluster; about three minutes.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from clusters import cluster
from rich.console import Console

from raydfkd.checkpoints import read_checkpoint
from raydfkd.job import open_job
from raydfkd.local import LocalExecutor
from raydfkd.metrics import MetricsLog, read_metrics
from raydfkd.progress import Monitor
from raydfkd.recipe import load_recipe

pytestmark = pytest.mark.cluster

HERE = Path(__file__).parent
BACK_WITHIN_S = 30
PATIENCE_S = 90.0
NOTICE_S = 8
CHECKPOINT_EVERY = 100


def recipe_file(folder: Path) -> Path:
    """A long training on images that are there already."""
    recipe = load_recipe(
        "digits-generators",
        (
            "name=small",
            "teacher.options={widths: [4, 8]}",
            "teacher.weights=random",
            "teacher.train=null",
            "real_data=null",
            "student.options={widths: [4]}",
            "synthesis.steps=10",
            "transfer_set.images_per_class=40",
            "transfer_set.unit={classes: 10, images_per_class: 20}",
            "distill.steps=1000000",
            f"distill.checkpoint_every={CHECKPOINT_EVERY}",
            "distill.log_every=10",
            "distill.batch_size=32",
            "runtime.device=cpu",
            "runtime.student_workers={min: 1, max: 2}",
            "runtime.cpus_per_student_worker=0.5",
            "runtime.resources_per_student_worker={train: 1}",
        ),
        str(folder / "run"),
    )
    monitor = Monitor(Console(file=io.StringIO()), MetricsLog(folder / "synthesis.jsonl", fresh=True))
    LocalExecutor().synthesize(open_job(recipe), monitor)
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
    raise AssertionError(f"not within {within_s} s: {read_metrics(metrics)[-3:] if metrics.exists() else 'no entry'}")


def saved_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints that are there now and whole."""
    steps = []
    for path in run_dir.glob("student-*/checkpoint_*/state.pt"):
        with contextlib.suppress(OSError, RuntimeError, EOFError):  # just written, or about to be replaced
            steps.append(read_checkpoint(path.read_bytes())["trainer"]["step"])
    return steps


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
        arguments = [str(recipe), str(tmp_path / "run"), nodes.address, str(metrics)]
        started = time.time()
        driver = subprocess.Popen(
            [sys.executable, str(HERE / "train_driver.py"), *arguments],
            env=environment,
            stdout=(tmp_path / "driver.out").open("w"),
            stderr=subprocess.STDOUT,
        )
        try:
            both = next_with(2, after=started, step=CHECKPOINT_EVERY + 20)
            timeline["start to a step on two workers"] = read_metrics(metrics)[0]["time"] - started

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
            saved = set()
            while time.time() < announced + NOTICE_S:
                saved.update(saved_steps(tmp_path / "run"))
                time.sleep(0.1)
            nodes.kill(third)
            alone = next_with(1, after=announced)
            before = [entry for entry in read_metrics(metrics) if entry["time"] < alone["time"]]
            timeline["drain: last step on two workers to a step on one"] = alone["time"] - before[-1]["time"]
            assert any(step % CHECKPOINT_EVERY for step in saved), "the notice was answered by a checkpoint"
        finally:
            driver.kill()
            driver.wait()
            (tmp_path / "timeline.json").write_text(json.dumps(timeline, indent=1))
    assert timeline["kill to a step on one worker"] < BACK_WITHIN_S, timeline
    assert timeline["drain: last step on two workers to a step on one"] < BACK_WITHIN_S, timeline
