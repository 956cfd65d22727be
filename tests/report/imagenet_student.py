"""How a student of the ImageNet slice does on pictures that had no part in its making.

    raydfkd run jobs/imagenet-1000-generators.yaml --set scale=slice
    python tests/report/imagenet_student.py FOLDER

Judged by agreement with the teacher (`raydfkd evaluate --pictures`), beside the same network untrained, on crops of
scikit-image's photographs of three of the slice's classes (Egyptian cat, espresso, missile) and on images made by
inverting the verifier into the same classes. FOLDER gets the pictures and is used again where it has them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image
from skimage import data

from raydfkd.config.load import load_recipe
from raydfkd.networks.build import build_network

JOB = "jobs/imagenet-1000-generators.yaml"
CROPS = 40
"""Of each photograph, squares of half its shorter edge to all of it, at random places."""
PROBE = (
    "teacher.network=pypi:efficientnet_lite1",
    "teacher.image_space.size=112",
    "verifier=null",
    "synthesis.stages=[{pool: 2, steps: 100}, {steps: 150}]",
    "synthesis.threads=1",
    "transfer_set.images_per_class=2",
    "transfer_set.unit={classes: 20, images_per_class: 2}",
)


def crop_photographs(folder: Path) -> None:
    """Write crops of the photographs, the same every time."""
    rng = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    for name in ("chelsea", "coffee", "rocket"):
        photograph = Image.fromarray(getattr(data, name)())
        for number in range(CROPS):
            share, across, down = torch.rand(3, generator=rng).tolist()
            edge = round(min(photograph.size) * (0.5 + 0.5 * share))
            left, top = (
                round(at * (length - edge)) for at, length in zip((across, down), photograph.size, strict=True)
            )
            photograph.crop((left, top, left + edge, top + edge)).save(folder / f"{name}-{number}.png")


def invert_verifier(folder: Path, classes: tuple[int, ...]) -> None:
    """Make the probe's set and write its images as files."""
    changes = (*PROBE, f"transfer_set.classes={list(classes)}", "name=probe")
    settings = [part for change in changes for part in ("--set", change)]
    settings += ["--run-dir", str(folder.parent / "probe-run")]
    raydfkd("synthesize", "jobs/imagenet-dream.yaml", *settings)
    raydfkd("export", "set", "jobs/imagenet-dream.yaml", "--format", "folder", "--to", str(folder), *settings)


def raydfkd(*arguments: str) -> str:
    command = [sys.executable, "-m", "raydfkd", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def agreement(pictures: Path, student: Path | None) -> str:
    """Of the run's student, or of other weights."""
    other = () if student is None else ("--student", str(student))
    answer = raydfkd("evaluate", JOB, "--set", "scale=slice", "--pictures", str(pictures), *other, "--json")
    found = json.loads(answer.splitlines()[-1])
    return f"{found['agreement']:.1%} of {found['judged_images']}"


def main(folder: Path) -> None:
    recipe = load_recipe(JOB, ["scale=slice"])
    photographs, probe, fresh = folder / "photographs", folder / "probe", folder / "untrained.safetensors"
    if not photographs.is_dir():
        crop_photographs(photographs)
    if not probe.is_dir():
        invert_verifier(probe, recipe.classes)
    untrained = build_network(recipe.student, recipe.teacher, where="student", seed=0)
    safetensors.torch.save_file(untrained.state_dict(), fresh)
    for name, pictures in (("photographs", photographs), ("verifier inverted", probe)):
        sys.stdout.write(f"{name}: student {agreement(pictures, None)}, untrained {agreement(pictures, fresh)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
