from __future__ import annotations

import pytest
import torch
from toy import SYNTHESIZERS_UNDER_TEST, batches_of, batchnorm_teacher, toy_recipe

from raydfkd.errors import RecipeError
from raydfkd.images.augment import Affine
from raydfkd.runner.check import check
from raydfkd.seeds import rng_from
from raydfkd.synthesis.build import build_synthesizer

TAUGHT = ["real_data=digits", "teacher.classes=10", "teacher.train={epochs: 1, augment: [mixup]}"]
MIXED = {
    "own criterion": (
        ["distill.augment=[flip, mixup]", "distill.criterion=test_augment:ReadsNumbers"],
        "distill.augment[1]",
        "the criterion test_augment:ReadsNumbers",
    ),
    "moments by class": (
        ["synthesis.augment=[mixup]", "synthesis.objective=[one_hot, {term: bn_moments, scope: class}]"],
        "synthesis.augment[0]",
        "the term bn_moments",
    ),
    "labels of a stage": (
        [
            "synthesis.stages=[{steps: 2, augment: [mixup]}]",
            "synthesis.objective=[one_hot, {term: bn_moments, scope: class}]",
        ],
        "synthesis.stages[0].augment[0]",
        "the term bn_moments",
    ),
    "teacher": ([*TAUGHT, "teacher.weights=not_there.pt"], "teacher.train.augment[0]", "the teacher's training"),
}


class ReadsNumbers:
    """A criterion of the user's that takes labels to be numbers."""

    needs_labels = True

    def __call__(self, student, teacher, labels):
        return student.logits.gather(1, labels[:, None]).mean()


@pytest.mark.parametrize("case", MIXED)
def test_images_are_not_mixed_where_something_reads_the_label_of_each(tmp_path, case):
    settings, where, reader = MIXED[case]
    with pytest.raises(RecipeError) as error:
        check(toy_recipe(tmp_path, settings))
    assert str(error.value) == (
        f"{where}: mixup mixes images, but {reader} takes each to be of one class; drop one of them"
    )


@pytest.mark.parametrize("synthesizer", SYNTHESIZERS_UNDER_TEST)
def test_images_can_be_mixed_where_nothing_reads_a_label(tmp_path, synthesizer):
    settings = ["synthesis.augment=[mixup]", "synthesis.objective=[one_hot, bn_moments]", "distill.augment=[mixup]"]
    recipe = toy_recipe(tmp_path, settings, synthesizer=synthesizer)
    check(recipe)
    assert batches_of(recipe)


def test_images_without_targets_cannot_be_of_some_classes_only(tmp_path):
    settings = ["synthesis.targets=none", "synthesis.objective=[one_hot]", "transfer_set.classes=[1, 3]"]
    recipe = toy_recipe(tmp_path, settings, synthesizer="generator")
    with pytest.raises(
        RecipeError, match="transfer_set.classes names 2 of the teacher's 4 classes, but with synthesis.targets none"
    ):
        build_synthesizer(recipe, batchnorm_teacher(), torch.device("cpu"))


def turned(height, width):
    """A disc of 10 pixels across in the middle of white, turned by up to half a turn."""
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    disc = ((x**2 + y**2).sqrt() - 5).clamp(0, 1).expand(8, 1, -1, -1)
    return disc, Affine(degrees=180)(disc, rng_from(3))


def test_disc_that_is_turned_stays_a_disc_in_images_of_any_shape():
    for height, width in ((24, 24), (24, 48), (48, 24)):
        disc, seen = turned(height, width)
        torch.testing.assert_close(seen, disc, atol=0.3, rtol=0)
