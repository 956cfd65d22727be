"""Seconds and memory of every step from plan to report on a set of 1.3 million images of 1,000 classes, 13,000 units.

    python tests/report/large_set.py FOLDER [--images-per-class 1300] [--set transfer_set.logits=top_k]

Noise of 3 x 8 x 8 pixels stands in for synthesis; records, files and logits are real. Each step is a process of its
own, with one thread. Prints a row each; the set stays in FOLDER/run, and a step that finds its work done does the rest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raydfkd.distillation.training import StudentTraining
    from raydfkd.job import Job

RECIPE = """
name: large
run_dir: {folder}/run
teacher:
  network: convnet
  options: {{widths: [8]}}
  classes: 1000
  weights: random
  image_space: {{channels: 3, size: 8, mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}}
student: {{network: convnet, options: {{widths: [4]}}}}
synthesis: {{synthesizer: noise_images, targets: none}}
transfer_set:
  images_per_class: {images}
  unit: {{classes: 10, images_per_class: 10}}
distill:
  steps: 200
  batch_size: 256
  criterion: soft_kl
  optimizer: {{lr: 1e-3}}
  source: snapshot
  teacher_logits: stored
runtime: {{executor: local, device: cpu}}
"""


def first_snapshot(recipe: str, changes: list[str]) -> float:
    job = _job(recipe, changes)
    began = time.perf_counter()
    job.snapshot()
    return time.perf_counter() - began


def first_batch(recipe: str, changes: list[str]) -> float:
    """To the first batch of a fresh process, with the snapshot, the plan of an epoch and a shuffle buffer."""
    training = _training(recipe, changes)
    began = time.perf_counter()
    next(iter(training._source))
    return time.perf_counter() - began


def one_epoch(recipe: str, changes: list[str]) -> float:
    """Every batch of a pass over the set, shuffled."""
    training = _training(recipe, changes)
    began, rows = time.perf_counter(), 0
    for batch in training._source:
        rows += len(batch.labels)
        if rows >= batch.snapshot_images:
            return time.perf_counter() - began
    raise AssertionError("a source has no end")


def look(recipe: str, changes: list[str]) -> float:
    """A sample of the set, as the report looks at its images."""
    from raydfkd.runner.view import SetView

    view = SetView(_job(recipe, changes))
    began = time.perf_counter()
    view.sample(10_000)
    return time.perf_counter() - began


def _training(recipe: str, changes: list[str]) -> StudentTraining:
    from raydfkd.distillation.trainer import TrainingHooks, ignore
    from raydfkd.distillation.training import StudentTraining
    from raydfkd.networks.teacher import open_teacher

    job = _job(recipe, changes)
    return StudentTraining(job, open_teacher(job.recipe), job.phases[-1], hooks=TrainingHooks(on_log=ignore))


def _job(recipe: str, changes: list[str]) -> Job:
    from raydfkd.config.load import load_recipe
    from raydfkd.job import open_job

    return open_job(load_recipe(recipe, changes))


PARTS: Mapping[str, Callable[[str, list[str]], float]] = {
    "first snapshot": first_snapshot,
    "first batch": first_batch,
    "an epoch of batches": one_epoch,
    "sample of 10,000 images": look,
}
COMMANDS = {
    "plan": ["plan"],
    "synthesize": ["synthesize"],
    "first snapshot": [],
    "first batch": [],
    "an epoch of batches": [],
    "run, the set being there: 200 steps, judging, report": ["run"],
    "sample of 10,000 images": [],
    "report again": ["report"],
    "verify": ["verify"],
    "gc": ["gc", "--dry-run"],
}


def measured(command: list[str], log: Path) -> tuple[float, float, float, str]:
    """Seconds, seconds of CPU, the most memory in MiB and the last line of a command."""
    with log.open("w") as out:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **ONE_THREAD})
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
    said = log.read_text().strip().splitlines()[-1:] or [""]
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}: {log}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, said[0]


ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images-per-class", type=int, default=1300)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--part", choices=PARTS)
    given = parser.parse_args()
    folder = given.folder.absolute()
    recipe = folder / "large.yaml"
    if given.part:
        sys.stdout.write(f"{PARTS[given.part](str(recipe), given.set):.2f}\n")
        return
    folder.mkdir(parents=True, exist_ok=True)
    recipe.write_text(RECIPE.format(folder=folder, images=given.images_per_class))
    changes = [argument for change in given.set for argument in ("--set", change)]
    sys.stdout.write("| | seconds | of CPU, with imports | MiB at most |\n|---|---|---|---|\n")
    for name, command in COMMANDS.items():
        part = [sys.executable, __file__, str(folder), "--part", name]
        whole = [sys.executable, "-m", "raydfkd", *command, str(recipe)]
        seconds, cpu, most, said = measured([*(whole if command else part), *changes], folder / "log.txt")
        shown = seconds if command else float(said)
        sys.stdout.write(f"| {name} | {shown:.1f} | {cpu:.1f} | {most:.0f} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
