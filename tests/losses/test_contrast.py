from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from toy import batches_of, batchnorm_teacher, joined, toy_images, toy_recipe, unit_of

from raydfkd.errors import RecipeError
from raydfkd.losses import contrast
from raydfkd.losses.objective import TERMS, View
from raydfkd.networks.observed import Observation, ObservedNetwork
from raydfkd.networks.teacher import open_teacher
from raydfkd.synthesis.build import build_synthesizer
from raydfkd.synthesis.generator_training import GeneratorTraining

LAYERS = ("body.0", "body.1.2")


def term_of(observed_images=2, **options):
    term = TERMS.build("contrast", options, where="test")
    observed = ObservedNetwork(batchnorm_teacher(), taps=term.taps, frozen=True)
    term.prepare(observed(toy_images(observed_images)))
    return term, observed


def view_of(images, observed):
    return View(images=images, targets=None, teacher=observed(images), observe=observed)


def value_of(term, view, seed=5):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return term(view)


def commit(term, view, seed):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        term.commit(view)


def directions(term, features):
    first, _, last = term.head
    return F.normalize(F.linear(F.relu(F.linear(features, first.weight, first.bias)), last.weight, last.bias), dim=1)


def test_contrast_is_the_cross_entropy_of_choosing_the_image_that_a_second_view_is_of(monkeypatch):
    monkeypatch.setattr(contrast, "_part_of_each", lambda images, least: images.flip(3))
    term, observed = term_of(width=6, temperature=0.3, negatives=8)
    images, kept = toy_images(4), toy_images(3, seed=1).detach()
    commit(term, view_of(kept, observed), 0)
    both = torch.cat([images, kept])
    first, second = (directions(term, observed(batch).features) for batch in (both, both.flip(3)))
    first = first.detach()
    choices = [
        -torch.log(torch.exp(second[i] @ first[i] / 0.3) / sum(torch.exp(second[i] @ other / 0.3) for other in first))
        for i in range(7)
    ]
    expected = sum(choices[:4]) / 4 + sum(choices[4:]) / 3
    found = term(view_of(images, observed))
    torch.testing.assert_close(found, expected)
    moved = (images, *term.parameters())
    torch.testing.assert_close(torch.autograd.grad(found, moved), torch.autograd.grad(expected, moved))


def test_gradient_reaches_the_images_through_the_second_view_only():
    term, observed = term_of()
    images = toy_images(4)
    first = observed(images.detach())
    alone = View(images=images, targets=None, teacher=first, observe=observed)
    (through_both,) = torch.autograd.grad(value_of(term, view_of(images, observed)), images)
    (through_second,) = torch.autograd.grad(value_of(term, alone), images)
    torch.testing.assert_close(through_both, through_second, rtol=0, atol=0)


def test_gradient_agrees_with_finite_differences_while_the_first_views_are_held():
    weights = torch.randn(16, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def look(images):
        return Observation(logits=images, features=(images.flatten(1) @ weights).tanh())

    term = TERMS.build("contrast", {"width": 3}, where="test")
    images, kept = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    held = look(images)
    term.prepare(held)
    term.double()
    commit(term, view_of(kept, look), 0)

    def value(images):
        return value_of(term, View(images=images, targets=None, teacher=held, observe=look))

    assert torch.autograd.gradcheck(value, images.requires_grad_())


def test_images_and_bank_that_are_all_alike_leave_nothing_but_a_guess(monkeypatch):
    monkeypatch.setattr(contrast, "_part_of_each", lambda images, least: images)
    term, observed = term_of()
    view = view_of(toy_images(1).expand(4, -1, -1, -1), observed)
    assert term(view).item() == pytest.approx(math.log(4), abs=1e-5)
    commit(term, view, 0)
    commit(term, view, 0)
    assert term(view).item() == pytest.approx(2 * math.log(12), abs=1e-5)


def test_trained_head_tells_different_images_apart_and_not_images_that_are_alike():
    ends = []
    unlike = toy_images(6).detach() + torch.linspace(-3, 3, 6).view(6, 1, 1, 1)
    for images in (unlike, unlike[:1].expand_as(unlike)):
        term, observed = term_of(crop=0.8)
        optimizer = torch.optim.Adam(term.parameters(), lr=1e-2)
        for seed in range(40):
            value = value_of(term, view_of(images, observed), seed)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        ends.append(value.item())
    assert ends[0] < 0.7 * math.log(6)
    assert ends[1] > 0.95 * math.log(6)


def test_bank_holds_the_newest_images_and_a_step_sees_some_of_them():
    term, observed = term_of(bank=5, negatives=3)
    batches = [view_of(toy_images(4, seed=seed), observed) for seed in (1, 2)]
    for view in batches:
        commit(term, view, 0)
    newest = torch.cat([view.teacher.features for view in batches])[-5:]
    torch.testing.assert_close(term.bank[:, 0], newest)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [term._kept() for _ in range(20)]
    assert {len(rows) for rows in drawn} == {3}
    assert len({tuple(rows.flatten().tolist()) for rows in drawn}) > 3
    assert all(any(torch.equal(row, known) for known in term.bank) for rows in drawn for row in rows)


def test_outputs_of_layers_are_averaged_over_positions_and_put_side_by_side():
    term, observed = term_of(layers=LAYERS)
    seen = observed(toy_images(3))
    expected = torch.cat([seen.layers[path].mean((2, 3)) for path in LAYERS], 1)
    torch.testing.assert_close(term._features(seen), expected)


@pytest.mark.parametrize("least", [0.25, 1.0])
def test_second_view_is_a_part_of_the_image_and_half_of_them_are_mirrored(least):
    ramp = torch.linspace(-1, 1, 32).expand(200, 1, 32, 32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = contrast._part_of_each(ramp, least)
    rises = (made[:, 0, 16, 20] - made[:, 0, 16, 12]) / (ramp[0, 0, 0, 20] - ramp[0, 0, 0, 12])
    assert 70 < (rises < 0).sum() < 130
    shares = rises.abs()
    assert shares.max() <= 1 + 1e-5
    assert shares.min() >= (least * 3 / 4) ** 0.5 - 1e-5
    assert made.abs().max() <= 1
    if least == 1.0:
        assert shares.max() == pytest.approx(1, abs=1e-5)


def test_path_that_no_layer_has_is_answered_with_the_nearest(tmp_path):
    recipe = toy_recipe(tmp_path, ["synthesis.objective=[{term: contrast, layers: [body.99]}]"])
    with pytest.raises(
        RecipeError, match=r"synthesis.objective's contrast names the layer 'body.99', which the teacher"
    ):
        batches_of(recipe)


RENEWED = (
    "synthesis.objective=[cross_entropy, {term: contrast, width: 8}]",
    "synthesis.emissions=1",
    "synthesis.renewal={steps: 3}",
)


def test_contrast_makes_images_of_a_generator_differ_and_follows_from_the_unit_alone(tmp_path):
    recipe = toy_recipe(tmp_path, RENEWED, synthesizer="generator")
    synthesizer = build_synthesizer(recipe, open_teacher(recipe).module, torch.device("cpu"))
    unit, other = unit_of((0, 1), 6), unit_of((0, 1), 6, seed=2)
    made = []
    for one in (unit, other, unit):
        torch.manual_seed(len(made))
        made.append(joined(list(synthesizer.produce(one.request, lambda _: None))).images)
    assert torch.equal(made[0], made[2])
    assert not torch.equal(made[0], made[1])


@pytest.mark.parametrize("synthesizer", ["pixels", "generator"])
def test_head_is_trained_along_with_the_images(tmp_path, synthesizer):
    settings = RENEWED if synthesizer == "generator" else RENEWED[:1]
    recipe = toy_recipe(tmp_path, settings, synthesizer=synthesizer)
    made = build_synthesizer(recipe, open_teacher(recipe).module, torch.device("cpu"))
    list(made.produce(unit_of((0, 1), 3).request, lambda _: None))
    objective = made._setting.judge.objective
    trained = {name: parameter.clone() for name, parameter in objective.named_parameters()}
    objective.begin()
    assert len(trained) == 4
    assert all(not torch.equal(parameter, trained[name]) for name, parameter in objective.named_parameters())


def test_generator_training_goes_on_from_its_state_with_head_and_bank(tmp_path):
    recipe = toy_recipe(tmp_path, RENEWED, synthesizer="generator")

    def training() -> GeneratorTraining:
        synthesizer = build_synthesizer(recipe, open_teacher(recipe).module, torch.device("cpu"))
        return synthesizer.training(unit_of((0, 1), 3).request)

    undisturbed, left = training(), training()
    for one in (undisturbed, left):
        for _ in range(2):
            one.update()
            one.sample(6)
    taken_up = training()
    taken_up.load_state_dict(left.state_dict())
    for one in (undisturbed, taken_up):
        one.update()
        one.sample(2)
        one.update()
    assert torch.equal(taken_up.sample(5).images, undisturbed.sample(5).images)
    expected = undisturbed.state_dict()["terms"]
    assert all(torch.equal(found, expected[name]) for name, found in taken_up.state_dict()["terms"].items())
