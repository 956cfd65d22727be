"""A recipe of a few seconds for tests of what is around it."""

from __future__ import annotations

from pathlib import Path

from raydfkd.config.load import load_recipe
from raydfkd.config.recipe import Recipe


def small_recipe(run_dir: Path, *overrides: str) -> Recipe:
    return load_recipe(
        "digits-generators",
        (
            "name=small",
            "teacher.options={widths: [4, 8]}",
            "teacher.weights=random",
            "teacher.train=null",
            "real_data=null",
            "student.options={widths: [4]}",
            "synthesis.steps=40",
            "synthesis.emissions=2",
            "synthesis.batch_per_class=4",
            "synthesis.generator.width=8",
            "transfer_set.images_per_class=24",
            "transfer_set.unit={classes: 5, images_per_class: 4}",
            "distill.steps=40",
            "distill.checkpoint_every=20",
            "distill.log_every=10",
            "distill.source.wait_for=40",
            "runtime={workers: {min: 1, max: 2}, cpus_per_worker: 0.5, cpus_per_student_worker: 1}",
            *overrides,
        ),
        str(run_dir),
    )
