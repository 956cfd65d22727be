from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from toy import SPACE, PlainNet, batchnorm_teacher, toy_images, toy_recipe, toy_view

from raydfkd.config.schema import TermSpec
from raydfkd.errors import RecipeError
from raydfkd.images.pixels import PixelRange
from raydfkd.losses.objective import TERMS, Objective, Term, build_objective
from raydfkd.networks.observed import Need, ObservedNetwork
from raydfkd.synthesis.judge import Judge, ObjectiveNotFiniteError


def objective_of(*specs):
    terms = [TermSpec.model_validate(spec) for spec in specs]
    return build_objective(terms, has_targets=True, offers=frozenset(Need))


def test_parts_are_unweighted_and_the_total_is_weighted():
    view = toy_view()
    objective = objective_of({"term": "cross_entropy", "weight": 3.0}, {"term": "image_l2", "weight": 0.5}, "one_hot")
    value = objective(view)
    alone = {name: objective_of(name)(view).total for name in ("cross_entropy", "image_l2", "one_hot")}
    assert value.parts.keys() == alone.keys()
    for name, part in value.parts.items():
        torch.testing.assert_close(part, alone[name].detach())
    expected = 3 * alone["cross_entropy"] + 0.5 * alone["image_l2"] + alone["one_hot"]
    torch.testing.assert_close(value.total, expected)


def test_only_the_total_carries_a_gradient():
    value = objective_of("cross_entropy", "image_l2")(toy_view())
    assert value.total.requires_grad
    assert not any(part.requires_grad for part in value.parts.values())


def test_term_of_weight_zero_is_logged_and_moves_nothing():
    images = toy_images(6)
    weightless = objective_of("cross_entropy", {"term": "image_l2", "weight": 0.0})(toy_view(images))
    bare = objective_of("cross_entropy")(toy_view(images))
    assert weightless.parts["image_l2"] > 0
    (found,) = torch.autograd.grad(weightless.total, images)
    (expected,) = torch.autograd.grad(bare.total, images)
    torch.testing.assert_close(found, expected)


def test_needs_are_the_union_over_the_terms():
    objective = objective_of("cross_entropy", "activation", {"term": "bn_moments", "scope": "class"})
    assert objective.needs == {Need.FEATURES, Need.CLASS_MOMENTS}


def test_two_terms_of_one_name_are_refused_by_the_recipe(tmp_path):
    with pytest.raises(RecipeError, match="two terms are called image_l2; give one of them another `name:`"):
        toy_recipe(tmp_path, ["synthesis.objective=[image_l2, {term: image_l2, weight: 2}]"])


def test_one_term_can_stand_twice_under_two_names(tmp_path):
    recipe = toy_recipe(
        tmp_path, ["synthesis.objective=[bn_moments, {term: bn_moments, name: by_class, scope: class}]"]
    )
    objective = build_objective(recipe.synthesis.objective, has_targets=True)
    assert list(objective(toy_view(groups=2)).parts) == ["bn_moments", "by_class"]


def test_weight_can_change_over_a_share_of_the_steps_and_then_stays():
    ramp = {"from": 2.0, "to": 10.0, "until": 0.5}
    objective = objective_of({"term": "cross_entropy", "weight": ramp}, {"term": "one_hot", "weight": 3.0})
    for progress, weight in [(0.0, 2.0), (0.25, 6.0), (0.5, 10.0), (0.75, 10.0), (1.0, 10.0)]:
        value = objective(replace(toy_view(), progress=progress))
        expected = weight * value.parts["cross_entropy"] + 3 * value.parts["one_hot"]
        torch.testing.assert_close(value.total.detach(), expected)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("{form: 0, to: 1}", "weight.form: unknown key; did you mean from?"),
        ("{from: 0}", "weight.to is required and missing"),
        ("{from: 0, to: much}", 'weight.to is "much": input should be a valid number'),
        ("{from: 0, to: 1, until: 2}", "weight.until is 2: input should be less than or equal to 1"),
        ("much", 'weight is "much": input should be a valid number'),
    ],
)
def test_weight_that_is_no_number_and_no_schedule_is_refused_with_its_key(tmp_path, weight, message):
    with pytest.raises(RecipeError) as error:
        toy_recipe(tmp_path, [f"synthesis.objective.cross_entropy.weight={weight}"])
    assert str(error.value) == f"synthesis.objective.0.{message}"


@pytest.mark.parametrize("name", ["step", "total", '""'])
def test_name_that_logs_have_another_use_for_is_refused(tmp_path, name):
    with pytest.raises(RecipeError, match="which logs have another use for; give it another `name:`"):
        toy_recipe(tmp_path, [f"synthesis.objective=[{{term: one_hot, name: {name}}}]"])


@pytest.mark.parametrize("name", ["a.b", "keys", "items", "forward", "training", "mypkg.losses:Mine"])
def test_term_can_have_any_name(name):
    objective = objective_of({"term": "one_hot", "name": name})
    assert list(objective(toy_view()).parts) == [name]


def test_unknown_option_is_refused_with_its_place_in_the_recipe():
    with pytest.raises(RecipeError, match=r"synthesis.objective\[1\].*wieght.*unknown key"):
        objective_of("cross_entropy", {"term": "one_hot", "wieght": 2})


def test_committing_a_batch_tells_every_term():
    class Remembers(Term):
        def __init__(self):
            super().__init__()
            self.seen = []

        def commit(self, view):
            self.seen.append(view)

    terms = [Remembers(), Remembers()]
    view = toy_view()
    Objective([("one", 1.0, terms[0]), ("two", 1.0, terms[1])]).commit(view)
    assert [term.seen for term in terms] == [[view], [view]]


def judge(*specs, teacher=None):
    objective = objective_of(*specs)
    observed = ObservedNetwork(teacher or batchnorm_teacher(), taps=objective.needs, frozen=True)
    return Judge(teacher=observed, objective=objective, pixels=PixelRange(SPACE))


def test_batch_moments_are_the_same_beside_class_moments_as_alone():
    by_class = {"term": "bn_moments", "name": "by_class", "scope": "class"}
    images, targets = toy_images(6), torch.tensor([0, 0, 0, 1, 1, 1])
    _, alone = judge("bn_moments")(images, targets, groups=2)
    _, beside = judge("bn_moments", by_class)(images, targets, groups=2)
    _, class_alone = judge(by_class)(images, targets, groups=2)
    torch.testing.assert_close(beside.parts["bn_moments"], alone.parts["bn_moments"], rtol=1e-5, atol=0)
    torch.testing.assert_close(beside.parts["by_class"], class_alone.parts["by_class"], rtol=0, atol=0)


@pytest.mark.parametrize("scope", ["batch", "class"])
def test_moments_of_larger_parts_are_the_same_beside_those_of_each_image_as_alone(scope):
    larger = {"term": "bn_moments", "name": "larger", "scope": scope}
    by_image = {"term": "bn_moments", "name": "by_image", "scope": "image"}
    images, targets = toy_images(6), torch.tensor([0, 0, 0, 1, 1, 1])
    _, alone = judge(larger)(images, targets, groups=2)
    _, beside = judge(larger, by_image)(images, targets, groups=2)
    _, image_alone = judge(by_image)(images, targets, groups=2)
    torch.testing.assert_close(beside.parts["larger"], alone.parts["larger"], rtol=1e-5, atol=0)
    torch.testing.assert_close(beside.parts["by_image"], image_alone.parts["by_image"], rtol=0, atol=0)


def test_moments_of_each_image_are_those_of_a_batch_of_it_alone():
    by_image = {"term": "bn_moments", "name": "by_image", "scope": "image", "form": "squared", "statistic": "std"}
    images, targets = toy_images(4), torch.tensor([0, 0, 1, 1])
    _, found = judge(by_image)(images, targets, groups=2)
    batch = judge({**by_image, "scope": "batch"})
    singles = [batch(images[row : row + 1], targets[row : row + 1])[1].total for row in range(4)]
    torch.testing.assert_close(found.total, torch.stack(singles).mean(), rtol=1e-5, atol=0)


def test_term_that_asks_the_teacher_again_gets_as_many_moments(monkeypatch):
    class Asks(Term):
        needs = frozenset({Need.IMAGE_MOMENTS})

        def forward(self, view):
            assert [len(layer.mean) for layer in view.observe(view.images).moments] == [4, 4]
            return view.images.mean()

    monkeypatch.setitem(TERMS._factories, "asks", Asks)
    assert judge("asks")(toy_images(4), None)[1].total.isfinite()


@pytest.mark.parametrize("kept", [False, True])
def test_terms_see_the_images_in_the_teacher_s_units_too(monkeypatch, kept):
    views = []

    class Sees(Term):
        def forward(self, view):
            views.append(view)
            return view.images.mean()

        def commit(self, view):
            views.append(view)

    monkeypatch.setitem(TERMS._factories, "sees", Sees)
    asked = judge("sees")
    asked.keep(toy_images(4).detach(), None, 0.0) if kept else asked(toy_images(4), None)
    (view,) = views
    torch.testing.assert_close(view.seen, (view.images * 0.225 + 0.5 - 0.4) / 0.3)


def test_kept_logits_are_the_teacher_s_answer_to_exactly_the_stored_pixels():
    teacher = batchnorm_teacher()
    kept = judge("cross_entropy", teacher=teacher).keep(toy_images(5).detach() * 3, torch.tensor([0, 1, 2, 3, 0]), 1.5)
    stored = (kept.images.float() / 255 - 0.4) / 0.3
    with torch.no_grad():
        expected = teacher(stored)
    torch.testing.assert_close(kept.teacher_logits.float(), expected, rtol=2e-3, atol=2e-3)
    assert kept.labels.tolist() == [0, 1, 2, 3, 0]
    assert (kept.objective, kept.student_version) == (1.5, -1)


def test_unconditional_images_are_labelled_with_the_teacher_s_answer():
    kept = judge("one_hot").keep(toy_images(8).detach(), None, 0.0)
    assert kept.labels.tolist() == kept.teacher_logits.argmax(1).tolist()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_image_that_is_not_finite_is_never_stored(value):
    images = toy_images(5).detach()
    images[3, 0, 2, 2] = value
    with pytest.raises(
        ObjectiveNotFiniteError, match="1 of 5 images, or the teacher's answers to them, are not finite"
    ):
        judge("one_hot").keep(images, None, 0.0)


def test_answer_that_is_too_large_to_be_stored_is_an_error():
    teacher = batchnorm_teacher()
    with torch.no_grad():
        teacher.head.bias.fill_(1e6)
    with pytest.raises(ObjectiveNotFiniteError, match="5 of 5 images, or the teacher's answers"):
        judge("one_hot", teacher=teacher).keep(toy_images(5).detach(), None, 0.0)


def test_judge_of_a_teacher_without_batchnorm_works_where_no_term_asks_for_moments():
    _, value = judge("cross_entropy", "activation", teacher=PlainNet())(toy_images(4), torch.tensor([0, 1, 2, 3]))
    assert value.total.isfinite()
