from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from sklearn.mixture import GaussianMixture
from toy import CLASSES, SYNTHESIZERS_UNDER_TEST, batches_of, joined, toy_recipe, unit_of

from raydfkd.config.schema import SelectSpec
from raydfkd.data.batches import SyntheticBatch
from raydfkd.errors import RecipeError
from raydfkd.runner.check import check
from raydfkd.seeds import rng_from
from raydfkd.synthesis.selection import SELECTORS, SelectingSynthesizer, posterior_of_the_higher
from raydfkd.synthesis.synthesizer import num_steps_of


class Numbered:
    """Makes images whose pixels are their numbers, in batches of some of each class; the teacher is as sure as said."""

    def __init__(self, per_batch, confidences=lambda count: torch.linspace(0.3, 0.9, count)):
        self._per_batch, self._confidences = per_batch, confidences
        self.asked = []

    def produce(self, request, log, hook=None):
        self.asked.append(request.images_per_class)
        number = 0
        for first in range(0, request.images_per_class, self._per_batch):
            each = min(self._per_batch, request.images_per_class - first)
            labels = torch.tensor(request.classes).repeat_interleave(each)
            sure = self._confidences(len(labels))
            odds = (sure / (1 - sure)).log()
            numbers = torch.arange(number, number + len(labels))
            number += len(labels)
            yield SyntheticBatch(
                images=numbers.byte().view(-1, 1, 1, 1),
                labels=labels,
                teacher_logits=torch.stack([odds, torch.zeros_like(odds)], 1).half(),
                objective=float(first),
            )


def selected(synthesizer, request, *, kind="clean_confidence", candidates=1.5, pool=1, is_conditional=True):
    spec = SelectSpec(kind=kind, candidates=candidates, judged_at_once=pool)
    selecting = SelectingSynthesizer(
        synthesizer, SELECTORS.build(kind, {}, where="test"), spec, is_conditional=is_conditional
    )
    return list(selecting.produce(request, lambda _: None))


@pytest.mark.parametrize("seed", range(4))
def test_mixture_agrees_with_that_of_another_library(seed):
    rng = rng_from(seed)
    values = torch.cat(
        [0.5 + 0.1 * torch.randn(40 + 30 * seed, generator=rng), 0.9 + 0.03 * torch.randn(80, generator=rng)]
    )
    values = values.double()
    fitted = GaussianMixture(
        2,
        means_init=[[float(values.min())], [float(values.max())]],
        precisions_init=[[[float(1 / values.var(correction=0))]]] * 2,
        weights_init=[0.5, 0.5],
        reg_covar=0.0,
        tol=0.0,
        max_iter=100,
    )
    with pytest.warns(match="converge"):
        fitted.fit(values[:, None].numpy())
    expected = torch.from_numpy(fitted.predict_proba(values[:, None].numpy()))[:, int(fitted.means_.argmax())]
    torch.testing.assert_close(posterior_of_the_higher(values), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("values", [[0.5], [1.0, 1.0, 1.0], [0.2, 0.9], [1.0] * 20 + [0.1], [0.0, 1e-9]])
def test_mixture_of_few_or_equal_values_is_finite_and_prefers_none_of_the_lower(values):
    found = posterior_of_the_higher(torch.tensor(values, dtype=torch.float64))
    assert found.isfinite().all()
    assert found[torch.tensor(values).argmax()] == found.max()


@pytest.mark.parametrize("kind", SELECTORS.names())
@pytest.mark.parametrize("pool", [1, 7, 1000])
@pytest.mark.parametrize(("wanted", "candidates"), [(1, 1.0), (4, 1.5), (5, 2.3), (10, 1.1), (3, 7)])
def test_each_class_keeps_exactly_what_is_wanted_of_it(kind, pool, wanted, candidates):
    made = Numbered(per_batch=3)
    found = selected(made, unit_of((2, 0, 3), wanted).request, kind=kind, candidates=candidates, pool=pool)
    assert made.asked == [math.ceil(round(candidates * wanted, 6))]
    assert Counter(joined(found).labels.tolist()) == dict.fromkeys((2, 0, 3), wanted)


def test_surest_images_of_each_class_are_kept_with_the_objective_of_their_batch():
    sure = torch.tensor([0.6, 0.95, 0.62, 0.97, 0.96, 0.94, 0.61, 0.63])  # two classes, four images of each
    found = selected(Numbered(4, lambda _: sure), unit_of((1, 0), 4).request, candidates=2, pool=1000)
    assert [batch.objective for batch in found] == [0.0, 4.0]
    for batch in found:
        assert (batch.images.flatten() % 8).tolist() == [1, 3, 4, 5]
        assert batch.labels.tolist() == [1, 1, 0, 0]


def test_images_of_a_pool_are_judged_together_and_no_more_than_that_is_held():
    one_by_one = selected(Numbered(1), unit_of((0,), 8).request, candidates=2, pool=1)
    assert [len(batch) for batch in one_by_one] == [1] * 8
    assert joined(one_by_one).images.flatten().tolist() == list(range(1, 16, 2)), "there was no choice"

    rising = iter(torch.linspace(0.5, 0.95, 16).split(1))
    pooled = selected(Numbered(1, lambda _: next(rising)), unit_of((0,), 8).request, candidates=2, pool=8)
    assert joined(pooled).images.flatten().tolist() == [*range(4, 8), *range(12, 16)]


def test_random_choice_follows_from_the_seed_and_differs_between_pools():
    request = unit_of((0,), 12).request
    one, same, other = (
        joined(selected(Numbered(6), asked, kind="random", candidates=2)).images.flatten().tolist()
        for asked in (request, request, replace(request, class_seeds=(9,)))
    )
    assert one == same != other
    places = [[number % 6 for number in one if number // 6 == pool] for pool in range(4)]
    assert len({tuple(found) for found in places}) > 1


def test_without_targets_all_images_are_one_class():
    found = selected(Numbered(5), unit_of((2, 0), 6).request, is_conditional=False, pool=1000)
    assert len(joined(found).labels) == 12


@pytest.mark.parametrize("synthesizer", SYNTHESIZERS_UNDER_TEST)
@pytest.mark.parametrize("targets", ["balanced", "none"])
def test_selection_of_a_recipe_makes_units_of_the_same_size(tmp_path, synthesizer, targets):
    settings = ["synthesis.select=clean_confidence", f"synthesis.targets={targets}", "synthesis.objective=[one_hot]"]
    if synthesizer == "generator":
        settings.append("synthesis.emissions=1")
    recipe = toy_recipe(tmp_path, settings, synthesizer=synthesizer)
    made = joined(batches_of(recipe, unit_of((3, 1), 4)))
    assert made.images.shape == (8, 1, 8, 8)
    if targets == "balanced":
        assert made.labels.bincount(minlength=CLASSES).tolist() == [0, 4, 0, 4]


def test_selection_keeps_candidates_of_the_recipe_without_one(tmp_path):
    request = unit_of((3, 1), 6)
    candidates = joined(batches_of(toy_recipe(tmp_path, ["synthesis.batch_size=100"]), request))
    recipe = toy_recipe(
        tmp_path, ["synthesis.batch_size=100", "synthesis.select={kind: clean_confidence, candidates: 2}"]
    )
    kept = joined(batches_of(recipe, unit_of((3, 1), 3)))
    there = {image.numpy().tobytes() for image in candidates.images}
    assert all(image.numpy().tobytes() in there for image in kept.images)
    confidence = [batch.teacher_logits.double().softmax(1).amax(1).mean() for batch in (kept, candidates)]
    assert confidence[0] > confidence[1]


def test_steps_of_a_selection_are_those_of_its_candidates(tmp_path):
    class Stepping(Numbered):
        def num_steps(self, request):
            return 10 * request.images_per_class

    spec = SelectSpec(kind="random", candidates=1.5)
    selector = SELECTORS.build("random", {}, where="test")
    selecting = SelectingSynthesizer(Stepping(1), selector, spec, is_conditional=True)
    assert num_steps_of(selecting, unit_of((0,), 4).request) == 60


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["synthesis.select=clean"], "synthesis.select: unknown selector 'clean'; did you mean clean_confidence"),
        (["synthesis.select={kind: random, candidates: 0.5}"], "synthesis.select.candidates is 0.5"),
        (["synthesis.select={kind: random, candidate: 2}"], "synthesis.select.candidate: unknown key"),
        (
            ["synthesis.select=random", "distill.source=live", "transfer_set.images_per_class=0"],
            "synthesis.select is random, but distill.source live trains on every image that is made; drop select",
        ),
    ],
)
def test_selection_that_cannot_be_made_is_refused_before_any_work(tmp_path, settings, message):
    with pytest.raises(RecipeError, match=message) as error:
        check(toy_recipe(tmp_path, settings, synthesizer="generator"))
    assert "\n" not in str(error.value)


def test_what_nobody_asked_a_class_of_is_kept_by_confidence_and_rarity():
    rng = rng_from(0)
    labels = (torch.rand(40_000, generator=rng) < 0.1).long()  # a class in ten images, the other in nine
    sure = torch.rand(40_000, generator=rng) < 0.5
    logits = torch.where(sure, 8.0, 1.0)[:, None] * torch.nn.functional.one_hot(labels, 2)
    selector = SELECTORS.build("balanced_confidence", {}, where="test")
    weights = logits.softmax(1)
    weights = (weights / weights.mean(0)).sum(1) * weights.amax(1) ** 2
    first = torch.zeros(40_000, dtype=torch.long)
    rank = selector.scores(logits, labels, rng_from(1)).argsort(descending=True)[:2000]
    first[rank] = 1
    for label in (0, 1):
        for is_sure in (True, False):
            rows = (labels == label) & (sure == is_sure)
            expected = 2000 * weights[rows].sum() / weights.sum()
            assert first[rows].sum().item() == pytest.approx(expected.item(), rel=0.12)
    again = selector.scores(logits, labels, rng_from(1)).argsort(descending=True)[:2000]
    assert torch.equal(rank, again)
