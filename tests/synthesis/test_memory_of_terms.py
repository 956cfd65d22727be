"""Terms that remember which batches were kept."""

from __future__ import annotations

import pytest
import torch
from toy import (
    SYNTHESIZERS_UNDER_TEST,
    batches_of,
    batchnorm_teacher,
    contents_of_interrupted,
    joined,
    toy_recipe,
    unit_of,
)

from raydfkd.images.pixels import nominal_to_uint8
from raydfkd.losses.objective import TERMS, Term
from raydfkd.synthesis.build import build_synthesizer

CPU = torch.device("cpu")
SETTINGS = {
    "pixels": ["synthesis.batch_size=2", "synthesis.stages=[{steps: 4}]", "synthesis.objective=[cross_entropy, bank]"],
    "generator": ["synthesis.objective=[cross_entropy, bank]", "synthesis.steps=6", "synthesis.emissions=3"],
}


class Bank(Term):
    """Keeps images away from the mean of those that were kept; its memory grows."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kept", None)
        self.register_buffer("seen", torch.zeros(0, 64))

    def forward(self, view):
        images = view.images.flatten(1)
        return (images.mean(0) * self.seen.mean(0)).mean() if len(self.seen) else 0 * images.mean()

    def commit(self, view):
        assert not view.images.requires_grad
        self.seen = torch.cat([self.seen, view.images.flatten(1)])
        self.kept = torch.tensor(len(self.seen))


@pytest.fixture(autouse=True)
def _bank(monkeypatch):
    monkeypatch.setitem(TERMS._factories, "bank", Bank)


@pytest.mark.parametrize("synthesizer", SYNTHESIZERS_UNDER_TEST)
def test_terms_are_told_once_of_each_batch_that_is_kept_as_it_is_stored(monkeypatch, tmp_path, synthesizer):
    views = []

    class Told(Term):
        def forward(self, view):
            return view.images.square().mean()

        def commit(self, view):
            views.append(view)

    monkeypatch.setitem(TERMS._factories, "told", Told)
    settings = ["synthesis.objective=[cross_entropy, told]", "synthesis.batch_size=2"]
    recipe = toy_recipe(tmp_path, settings if synthesizer == "pixels" else settings[:1], synthesizer=synthesizer)
    batches = batches_of(recipe, unit_of((0, 1), 3))
    assert len(views) == len(batches) > 1
    for view, batch in zip(views, batches, strict=True):
        assert torch.equal(nominal_to_uint8(view.images), batch.images)
        assert torch.equal(view.teacher.logits.half(), batch.teacher_logits)
        assert torch.equal(view.targets, batch.labels)
        assert (view.latents is None) == (synthesizer == "pixels")
        assert view.latents is None or len(view.latents) == len(batch)


@pytest.mark.parametrize("synthesizer", SYNTHESIZERS_UNDER_TEST)
def test_memory_of_a_term_counts_within_a_unit_and_not_from_one_to_the_next(tmp_path, synthesizer):
    recipe = toy_recipe(tmp_path, SETTINGS[synthesizer], synthesizer=synthesizer)
    used = build_synthesizer(recipe, batchnorm_teacher(), CPU)
    unit = unit_of((0, 1), 3)
    first, again = (joined(list(used.produce(unit.request, lambda _: None))) for _ in range(2))
    assert torch.equal(first.images, again.images)
    without = SETTINGS[synthesizer][:]
    without[without.index("synthesis.objective=[cross_entropy, bank]")] = "synthesis.objective=[cross_entropy]"
    plain = joined(batches_of(toy_recipe(tmp_path, without, synthesizer=synthesizer), unit))
    assert not torch.equal(first.images, plain.images)


@pytest.mark.parametrize("synthesizer", SYNTHESIZERS_UNDER_TEST)
@pytest.mark.parametrize("after", [2, 4, 5])
def test_memory_of_a_term_survives_the_interruption_of_a_unit(tmp_path, synthesizer, after):
    content, expected = contents_of_interrupted(tmp_path, SETTINGS[synthesizer], synthesizer=synthesizer, after=after)
    assert content == expected
