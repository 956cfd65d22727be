"""How far from the best student of a training the one lands that the evidence chooses, and the last one.

    python tests/report/selection.py FOLDER TEACHER... [--budget 120]

Teachers of the zoo, trained into FOLDER unless they are there, with the recipe that init writes and half of the teacher
as student; versions every 100 steps of the second half, real agreement on the validation split. Prints a row each.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from raydfkd.bench.quality import taught
from raydfkd.bench.zoo import write_recipe
from raydfkd.config.load import load_recipe
from raydfkd.distillation.evaluate import judge
from raydfkd.images.pixels import PixelRange
from raydfkd.runner import budget
from raydfkd.runner.estimate import judge_of
from raydfkd.runner.teach import judging_data


def row(folder: Path, name: str, seconds: float) -> str:
    own = taught(load_recipe(name), folder)
    page, _ = write_recipe(own, name, "half", seconds, folder)
    looks = []

    def recording(recipe, teacher):
        choose, images = judge_of(recipe, teacher), judging_data(own).load("validation")
        pixels = PixelRange(recipe.teacher.image_space)

        def look(student):
            real = judge(student, teacher, images.batches(500, lambda _: None), pixels, classes=recipe.teacher.classes)
            looks.append((choose(student), real.agreement))
            return looks[-1][0]

        return look

    budget.judge_of = recording
    with tempfile.TemporaryDirectory() as scratch:
        recipe = load_recipe(page, ["distill.select=estimate", "distill.publish_every=100"], run_dir=scratch)
        budget.run_within(recipe, seconds)
    best, chosen, last = max(real for _, real in looks), max(looks)[1], looks[-1][1]
    figures = " | ".join(f"{100 * share:.1f}" for share in (best, chosen, last))
    return f"| {name}, of {recipe.rounds} rounds | {len(looks)} | {figures} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("teachers", nargs="+")
    parser.add_argument("--budget", type=float, default=120.0)
    given = parser.parse_args()
    sys.stdout.write("| teacher | versions | best | chosen | last |\n|---|---|---|---|---|\n")
    for name in given.teachers:
        sys.stdout.write(row(given.folder, name, given.budget) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
