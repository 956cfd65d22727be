"""A run's student as files for those who have no raydfkd: what it is, and the forms in which it leaves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from raydfkd.config.recipe import Recipe
from raydfkd.errors import RecipeError
from raydfkd.images.real_data import open_real_data
from raydfkd.networks.build import PRUNED_TEACHER, build_network
from raydfkd.networks.weights import load_weights
from raydfkd.report.page import read_report
from raydfkd.runner.judge import class_names
from raydfkd.runner.run import student_path
from raydfkd.seeds import rng_from

COMPARED = 8
"""Random images on which every exported form is compared with the student."""
TOLERANCE = 1e-3
"""Largest difference of two logits, as a share of the largest logit, with which a form still is the student."""


@dataclass(frozen=True, kw_only=True)
class SavedStudent:
    """The student that a run has saved."""

    recipe: Recipe
    network: nn.Module
    """In eval mode on the CPU; it answers logits [N, K]."""
    digest: str
    """Names everything that it was trained on and by."""
    report: Mapping[str, Any] | None
    """Content of report.json; None where there is none, or where it is about another training."""

    @property
    def is_pruned(self) -> bool:
        """Whether it is a part of the teacher's network, which no library builds by its name."""
        return self.recipe.student.network == PRUNED_TEACHER

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of the K classes."""
        return names_of(self.recipe)

    @cached_property
    def images(self) -> Tensor:
        """Images in [0, 1] on which forms are compared."""
        return torch.rand((COMPARED, *self.recipe.teacher.image_space.shape), generator=rng_from(0))

    @cached_property
    def logits(self) -> Tensor:
        """The student's logits for them."""
        return self.answer(self.network, self.normalised)

    @property
    def normalised(self) -> Tensor:
        """The same images as the student takes them."""
        space = self.recipe.teacher.image_space
        return (self.images - _by_channel(space.mean)) / _by_channel(space.std)

    def answer(self, network: nn.Module, images: Tensor) -> Tensor:
        """What a network answers, without a graph."""
        with torch.no_grad():
            logits: Tensor = network(images)
        return logits

    def compare(self, form: str, logits: Tensor) -> float:
        """The largest difference between ``logits`` of an exported form and the student's, on ``images``.

        Raises:
            RecipeError: it is more than ``TOLERANCE``.
        """
        difference = float((logits - self.logits).abs().max())
        largest = float(self.logits.abs().max())
        if not difference <= TOLERANCE * largest:
            raise RecipeError(
                f"--format {form}: its logits differ from the student's by {difference:.3g}, where the largest is "
                f"{largest:.3g}; use another format"
            )
        return difference


def open_student(recipe: Recipe) -> SavedStudent:
    """The student in ``run_dir``.

    Raises:
        RecipeError: there is none, or it is of another network than the recipe's.
    """
    path = student_path(recipe)
    if not path.is_file():
        raise RecipeError(
            f"run_dir is {recipe.run_dir!r}: there is no student yet; `raydfkd run` or `distill` makes it"
        )
    network = build_network(recipe.student, recipe.teacher, where="student", seed=0)
    load_weights(network, str(path), where="the student in run_dir")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    report = _report(recipe)
    if report is not None and _training(report["recipe"]) != _training(json.loads(metadata.get("recipe", "{}"))):
        report = None
    return SavedStudent(recipe=recipe, network=network.eval(), digest=metadata.get("digest", ""), report=report)


def names_of(recipe: Recipe) -> tuple[str, ...]:
    """Names of the teacher's classes: the recipe's, else those of its real data where these are here, else numbers."""
    if recipe.teacher.class_names is None and recipe.real_data is not None:
        try:
            data = open_real_data(recipe.real_data, recipe.teacher.image_space, recipe.teacher.classes)
        except RecipeError:
            return recipe.class_names
        return class_names(recipe, data)
    return recipe.class_names


def _report(recipe: Recipe) -> Mapping[str, Any] | None:
    try:
        return read_report(Path(recipe.run_dir))
    except ValueError:
        return None


def _training(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a recipe that a student's weights follow from."""
    sections = ("seed", "teacher", "student", "synthesis", "rounds", "transfer_set", "distill")
    return {section: recipe.get(section) for section in sections}


def _by_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)
