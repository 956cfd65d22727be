"""What a few unlabelled pictures are worth: students of a teacher without BatchNorm, on the validation split.

    python tests/report/real_pictures.py FOLDER [SEED ...]

The recipe is fashion-lenet-deepinversion with 1,000 images and 2,000 steps of the student; 100 pictures of the training
split are written to FOLDER/pictures as PNG files without labels. Prints a JSON line for each way and seed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import raydfkd
from raydfkd.images.real_data import open_real_data

RECIPE = "fashion-lenet-deepinversion"
PICTURES = 100
PRIORS = ({"term": "cross_entropy"}, {"term": "total_variation", "weight": 4e-4})


def main() -> None:
    folder, seeds = Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]] or [0, 1, 2]
    torch.set_num_threads(1)
    base = {
        **{"runtime.executor": "local", "runtime.device": "cpu"},
        "teacher.weights": str(folder / "teacher.safetensors"),
        **{"transfer_set.images_per_class": 100, "transfer_set.unit.images_per_class": 100, "distill.steps": 2000},
    }
    pictures = str(write_pictures(folder / "pictures", raydfkd.load_recipe(RECIPE, base)))
    for seed in seeds:
        for name, change in ways(pictures).items():
            place = {"seed": seed, "run_dir": str(folder / f"{name.replace(' ', '-')}-{seed}")}
            recipe = raydfkd.load_recipe(RECIPE, {**base, **change, **place})
            raydfkd.distill(recipe, raydfkd.synthesize(recipe))
            judged = raydfkd.evaluate(recipe, split="validation")
            top1 = {role: judged[role]["top1"] for role in ("teacher", "student")}
            sys.stdout.write(f"{json.dumps({'way': name, 'seed': seed, **top1})}\n")
            sys.stdout.flush()


def write_pictures(place: Path, recipe: Any) -> Path:
    """Write pictures of the training split, if they are not there."""
    if not place.exists():
        split = open_real_data(recipe.real_data, recipe.teacher.image_space, recipe.teacher.classes).load("train")
        rows = torch.randperm(len(split.images), generator=torch.Generator().manual_seed(0))[:PICTURES]
        save(split.images[rows], place)
    return place


def save(images: torch.Tensor, place: Path) -> None:
    """Write grey images [N, 1, H, W], uint8, into a new folder as PNG files."""
    place.mkdir(parents=True)
    for position, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(place / f"{position:03}.png")


def ways(pictures: str) -> Mapping[str, Mapping[str, Any]]:
    """What is changed in the recipe, by the name of it."""

    def statistics(weight: float) -> dict[str, Any]:
        moments = {"term": "bn_moments", "form": "kl", "weight": weight}
        return {"synthesis.objective": [*PRIORS, moments], "synthesis.statistics": pictures}

    start = {"synthesis.start.images": pictures}
    return {
        "noise": {},
        "statistics 10": statistics(10),
        "statistics 100": statistics(100),
        "start": start,
        "start and statistics 10": {**start, **statistics(10)},
    }


if __name__ == "__main__":
    main()
