"""Student accuracy by the form in which a set stores its pixels and logits.

    python tests/report/formats.py FOLDER [--seconds 60] [--steps 2500] [--seeds 2] [--only stored]

One set is made, raw, in so many seconds of CPU, and written again in each form; students are trained on each for the
same steps and judged on the validation split; with no seeds only sizes are measured. Teacher and set stay in FOLDER.
Prints a row each.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from raydfkd.bench.quality import taught
from raydfkd.config.load import load_recipe
from raydfkd.config.recipe import Recipe
from raydfkd.data.batches import SyntheticBatch
from raydfkd.distillation.evaluate import judge
from raydfkd.distillation.metrics import Comparison
from raydfkd.distillation.trainer import TrainingHooks, ignore
from raydfkd.distillation.training import StudentTraining
from raydfkd.images.pixels import PixelRange
from raydfkd.job import Job, open_job
from raydfkd.networks.build import build_network
from raydfkd.networks.teacher import Teacher, open_teacher
from raydfkd.runner.storage import storage_of
from raydfkd.runner.teach import judging_data
from raydfkd.synthesis.worker import SynthesisWorker

MOST_UNITS = 1000
LIVE = [
    "raw",
    "png",
    "{kind: webp, quality: 100}",
    "{kind: jpeg, quality: 95}",
    "{kind: jpeg, quality: 75}",
    "{kind: webp, quality: 90}",
    "{kind: webp, quality: 75}",
]
LOGITS = ["float16", "{kind: top_k, k: 3}", "{kind: top_k, k: 1}"]
SAME_PIXELS = ("png", "{kind: webp, quality: 100}")


@dataclass(frozen=True, slots=True)
class Arm:
    """A form, and the way in which students are trained on it."""

    encoding: str
    logits: str
    teacher_logits: str
    temperature: int = 20

    def changes(self, seed: int, images_per_class: int, steps: int) -> list[str]:
        bare = ["distill.augment=[]"] if self.teacher_logits == "stored" else []
        return [
            f"transfer_set.encoding={self.encoding}",
            f"transfer_set.logits={self.logits}",
            f"distill.teacher_logits={self.teacher_logits}",
            f"transfer_set.images_per_class={images_per_class}",
            f"distill.criterion={{kind: soft_kl, temperature: {self.temperature}}}",
            f"distill.steps={steps}",
            f"seed={seed}",
            *bare,
        ]


ARMS = [Arm(encoding, "float16", "live") for encoding in LIVE] + [
    Arm("raw", logits, "stored", temperature) for temperature in (20, 1) for logits in LOGITS
]


def made(recipe: Recipe, teacher: Teacher, seconds: float) -> Job:
    """The job of the set that is made in so many seconds of CPU, or was made before."""
    job = open_job(recipe, teacher)
    job.transfer_set.create()
    if not job.snapshot().units:
        worker, began = SynthesisWorker(job, teacher, device=torch.device("cpu")), time.process_time()
        for unit in job.units:
            worker.run(unit)
            if time.process_time() - began > seconds:
                break
    return job


def written_again(source: Job, target: Job) -> float:
    """Write the rows of a set into that of another job; returns the bytes of an image."""
    target.transfer_set.create()
    for commit in source.snapshot().commits:
        sink = target.transfer_set.open(target.units_by_id[commit.unit])
        for part in commit.parts:
            rows = source.transfer_set.read(part)
            sink.write(
                SyntheticBatch(
                    images=rows.images, labels=rows.labels, teacher_logits=rows.teacher_logits, objective=0.0
                )
            )
        sink.commit(seconds=0.0)
    snapshot = target.snapshot()
    target.transfer_set.close(target.phases[-1].plan)
    return sum(part.bytes for commit in snapshot.commits for part in commit.parts) / snapshot.images


def judged(job: Job, teacher: Teacher) -> Comparison:
    """The figures of the student of a finished training."""
    recipe = job.recipe
    state = StudentTraining(job, teacher, job.phases[-1], hooks=TrainingHooks(on_log=ignore)).run()
    student = build_network(recipe.student, recipe.teacher, where="student", seed=0)
    student.load_state_dict(dict(state))
    images = judging_data(recipe).load("validation").batches(500, lambda _: None)
    space = recipe.teacher.image_space
    return judge(student, teacher.module, images, PixelRange(space), classes=recipe.teacher.classes)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--recipe", default="fashion-lenet")
    parser.add_argument("--only", choices=["live", "stored"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = given.folder.absolute()
    own = load_recipe(given.recipe)
    many = own.transfer_set.unit.images_per_class * MOST_UNITS
    alone = "synthesis.objective=[cross_entropy]"  # without the term that asks the student, who is trained afterwards
    changes = ["runtime.executor=local", "runtime.device=cpu", "rounds=1", alone]
    teacher_of = taught(load_recipe(given.recipe, changes), folder)
    changes.append(f"teacher.weights={teacher_of.teacher.weights}")
    whole = load_recipe(given.recipe, [*changes, f"transfer_set.images_per_class={many}"], run_dir=str(folder / "raw"))
    teacher = open_teacher(whole)
    source = made(whole, teacher, given.seconds)
    count = source.snapshot().images
    each = count // len(whole.classes)
    sys.stdout.write(f"{count:,} images, {given.steps:,} steps, {given.seeds} seeds\n\n")
    sys.stdout.write("| pixels | logits | the teacher | T | bytes an image | by plan | top-1 | agreement | s |\n")
    sys.stdout.write("|---|---|---|---|---|---|---|---|---|\n")
    for arm in [arm for arm in ARMS if given.only in (None, arm.teacher_logits)]:
        figures, began = [], time.process_time()
        for seed in range(max(1, given.seeds)):
            scratch = tempfile.mkdtemp(dir=folder)
            recipe = load_recipe(given.recipe, [*changes, *arm.changes(seed, each, given.steps)], run_dir=scratch)
            job = open_job(recipe, teacher)
            size, planned = written_again(source, job), storage_of(recipe, count).bytes / count
            if given.seeds and arm.encoding not in SAME_PIXELS:
                figures.append(judged(job, teacher))
            shutil.rmtree(scratch)
        took = (time.process_time() - began) / max(1, given.seeds)
        top1 = _figures([one.student.top1 for one in figures if one.student is not None])
        agreement = _figures([one.agreement for one in figures])
        form = f"{arm.encoding} | {arm.logits} | {arm.teacher_logits} | {arm.temperature}"
        sys.stdout.write(f"| {form} | {size:,.0f} | {planned:,.0f} | {top1} | {agreement} | {took:.0f} |\n")
        sys.stdout.flush()


def _figures(shares: list[float]) -> str:
    if not shares:
        return "as raw, or not trained"
    return f"{100 * statistics.mean(shares):.2f} ({', '.join(f'{100 * share:.2f}' for share in shares)})"


if __name__ == "__main__":
    main()
