"""What a teacher's certainty costs a student, and what a temperature gives back: on the validation split.

    python tests/report/oversure.py FOLDER TEACHER [--budget 120] [--seeds 3] [--times 8]

A teacher of the zoo as it is; one whose logits are so many times larger, which answers alike but is sure of all that it
sees, as networks are that were trained for long; and that one with the temperature that `raydfkd init` finds for it,
which is not told the factor. The rest of the recipe is what init writes for the first. Prints a row for each.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from raydfkd.bench.quality import spread, taught
from raydfkd.bench.zoo import Visit, visit_zoo
from raydfkd.config.load import load_recipe
from raydfkd.config.recipe import Recipe
from raydfkd.networks.hardness import temperature_for
from raydfkd.networks.teacher import open_teacher


def scaled(recipe: Recipe, times: float, folder: Path) -> Path:
    """The teacher's weights with logits so many times larger, in a file."""
    state = load_file(recipe.teacher.weights)
    of_classes = [name for name, tensor in state.items() if tensor.ndim and len(tensor) == recipe.teacher.classes]
    head = of_classes[-1].rpartition(".")[0]
    for name in (f"{head}.weight", f"{head}.bias"):
        state[name] = state[name] * times
    path = folder / f"{recipe.name}-{times:g}-times.safetensors"
    save_file(state, path)
    return path


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("teacher")
    arguments.add_argument("--budget", type=float, default=120)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--times", type=float, default=8)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    given.folder.mkdir(parents=True, exist_ok=True)
    own = taught(load_recipe(given.teacher), given.folder)
    sys.stdout.write("| logits | teacher.temperature | student |\n|---|---|---|\n")
    weights = scaled(own, given.times, given.folder)
    sure = own.teacher.model_copy(update={"weights": str(weights)})
    temperature = temperature_for(open_teacher(own.model_copy(update={"teacher": sure})).module, sure)
    for title, overrides in {
        "as they are | 1": (),
        f"{given.times:g} times | 1": (f"teacher.weights={weights}",),
        f"{given.times:g} times | {temperature:g}": (
            f"teacher.weights={weights}",
            f"teacher.temperature={temperature}",
        ),
    }.items():
        visit = Visit(
            teachers=(given.teacher,),
            budget_s=given.budget,
            seeds=tuple(range(given.seeds)),
            split="validation",
            students=("half",),
            controls=False,
            overrides=overrides,
        )
        top1 = [100 * row.result.student_top1 for row in visit_zoo(visit, given.folder)]
        sys.stdout.write(f"| {title} | {spread(top1, '.1f')} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
