"""What each class's own moments are worth to one generator a class, on the digits of scikit-learn.

    python tests/report/class_moments.py FOLDER [SEED ...]

The teacher is digits-convnet of the zoo, the method large_scale_generators, 60 images of each class. The moments are
those of the teacher's buffers, met by a pack of all classes together, or those of each class in 100 pictures of the
training split, written to FOLDER/pictures. Prints a JSON line for each way and seed; the validation split judges.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from real_pictures import save

import raydfkd
from raydfkd.config.load import page_data
from raydfkd.config.recipe import Recipe
from raydfkd.images.real_data import open_real_data

TEACHER, METHOD = "digits-convnet", "large_scale_generators"
PICTURES = 100
"""Of each class."""


def main() -> None:
    folder, seeds = Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]] or [0, 1, 2]
    torch.set_num_threads(1)
    base = {
        **{"runtime.executor": "local", "runtime.device": "cpu"},
        "teacher.weights": str(folder / "teacher.safetensors"),
        **{"transfer_set.images_per_class": 60, "transfer_set.unit.images_per_class": 60, "rounds": 1},
        **{"distill.steps": 1500, "distill.criterion": {"kind": "soft_kl", "temperature": 1}},
    }
    pictures = write_pictures(folder / "pictures", raydfkd.load_recipe(TEACHER, base))
    for seed in seeds:
        for name, synthesis in ways(str(pictures)).items():
            place = {"seed": seed, "run_dir": str(folder / f"{name.replace(' ', '-')}-{seed}")}
            recipe = raydfkd.load_recipe(TEACHER, {**base, **place}).with_synthesis(synthesis)
            raydfkd.distill(recipe, raydfkd.synthesize(recipe))
            judged = raydfkd.evaluate(recipe, split="validation")
            shares = {"teacher": judged["teacher"]["top1"], "student": judged["student"]["top1"]}
            found = {"way": name, "seed": seed, **shares, "agreement": judged["agreement"]}
            sys.stdout.write(f"{json.dumps(found)}\n")
            sys.stdout.flush()


def write_pictures(place: Path, recipe: Recipe) -> Path:
    """Write the pictures of each class, if they are not there."""
    if not place.exists():
        split = open_real_data(recipe.real_data, recipe.teacher.image_space, recipe.teacher.classes).load("train")
        for label in range(recipe.teacher.classes):
            save(split.images[split.labels == label][:PICTURES], place / str(label))
    return place


def ways(pictures: str) -> Mapping[str, Mapping[str, Any]]:
    """The synthesis of each, by the name of it."""
    synthesis = page_data(METHOD)["synthesis"]
    of_class = [{**term, "scope": "class"} if term["term"] == "bn_moments" else term for term in synthesis["objective"]]
    return {
        "buffers of the teacher": synthesis,
        "moments of each class": {
            **synthesis,
            "objective": of_class,
            "statistics": pictures,
            "statistics_per_class": True,
        },
    }


if __name__ == "__main__":
    main()
