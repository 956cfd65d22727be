"""Augmentations and terms that are told how far an optimisation is."""

from __future__ import annotations

import pytest
from toy import SYNTHESIZERS_UNDER_TEST, batches_of, toy_recipe, unit_of

from raydfkd.images.augment import AUGMENTATIONS
from raydfkd.losses.objective import TERMS, Term

STEPS = {"pixels": 4, "generator": 6}


@pytest.mark.parametrize("synthesizer", SYNTHESIZERS_UNDER_TEST)
def test_augmentation_that_asks_is_told_the_share_of_the_steps_that_is_made(monkeypatch, tmp_path, synthesizer):
    told = []

    class Curriculum:
        def __call__(self, images, rng, *, progress):
            told.append(progress)
            return images

    monkeypatch.setitem(AUGMENTATIONS._factories, "curriculum", Curriculum)
    settings = ["synthesis.augment=[flip, curriculum, {kind: jitter, pixels: 1}]"]
    batches_of(toy_recipe(tmp_path, settings, synthesizer=synthesizer), unit_of((0, 1), 2))
    assert told == [step / STEPS[synthesizer] for step in range(STEPS[synthesizer])]


@pytest.mark.parametrize("synthesizer", SYNTHESIZERS_UNDER_TEST)
def test_term_sees_the_share_of_the_steps_that_is_made(monkeypatch, tmp_path, synthesizer):
    told = []

    class Told(Term):
        def forward(self, view):
            told.append(view.progress)
            return view.images.square().mean()

    monkeypatch.setitem(TERMS._factories, "told", Told)
    recipe = toy_recipe(tmp_path, ["synthesis.objective=[told]"], synthesizer=synthesizer)
    batches_of(recipe, unit_of((0, 1), 2))
    assert told == [step / STEPS[synthesizer] for step in range(STEPS[synthesizer])]
