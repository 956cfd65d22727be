"""Judging a saved student."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raydfkd.config.recipe import Recipe
from raydfkd.devices import pick_device
from raydfkd.distill.evaluate import judge, predict
from raydfkd.errors import RecipeError
from raydfkd.images.pixels import PixelRange
from raydfkd.images.real_data import RealData, Split
from raydfkd.job import Job, open_job
from raydfkd.networks.build import build_network, count_parameters
from raydfkd.networks.weights import load_teacher, load_weights, weights_exist
from raydfkd.store.errors import DamagedError


def evaluate(recipe: Recipe, weights: str, data: RealData | None, *, split: Split = "test") -> dict[str, Any]:
    """Judge a saved student: top-1 of teacher and student on real images, agreement there or on the transfer set."""
    if not weights_exist(weights, where="--student"):
        raise RecipeError(f"--student is {weights!r}: no such file; `raydfkd run` or `distill` writes it")
    device = pick_device(recipe.runtime.device)
    pixels = PixelRange(recipe.teacher.image_space, device)
    teacher, _ = load_teacher(recipe)
    student = build_network(recipe.student, recipe.teacher, where="student", seed=0)
    load_weights(student, weights, where="--student")
    teacher, student = teacher.to(device), student.to(device)
    labels: Tensor | None = None
    if data is not None:
        real = data.load(split)
        images, labels = real.images, real.labels
    else:
        images = _some_images(open_job(recipe), 5000)
    found = dict(judge(predict(student, images, pixels), predict(teacher, images, pixels), labels))
    return {
        "teacher": {"top1": found.get("teacher.top1"), "parameters": count_parameters(teacher)},
        "student": {"top1": found.get("student.top1"), "parameters": count_parameters(student)},
        "agreement": found["agreement"],
        "judged_on": f"{recipe.real_data.kind} {split}" if recipe.real_data else "transfer set",
    }


def _some_images(job: Job, count: int) -> Tensor:
    """The first images of the transfer set, enough parts for ``count`` of them."""
    pieces: list[Tensor] = []
    for commit in job.snapshot().commits:
        for part in commit.parts:
            if sum(map(len, pieces)) < count:
                try:
                    pieces.append(job.transfer_set.read(part).images)
                except DamagedError as damage:
                    job.transfer_set.mark_damaged(commit, damage)
    if not pieces:
        raise RecipeError(f"transfer_set.uri is {job.recipe.transfer_set.uri}: there is no image yet; synthesize first")
    return torch.cat(pieces)[:count]
