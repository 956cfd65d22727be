from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from toy import batchnorm_teacher, joined, toy_recipe, toy_view, unit_of

from raydfkd.config.schema import TermSpec
from raydfkd.config.static_check import static_check
from raydfkd.errors import RecipeError
from raydfkd.job import asks_student
from raydfkd.losses.objective import TERMS, Term, View, build_objective
from raydfkd.networks.observed import Layer, Need, Observation
from raydfkd.synthesis.build import build_synthesizer


class Given(Term):
    """The value that the images hold."""

    def forward(self, view):
        return view.images.sum()


class Remembering(Given):
    needs_targets = True

    def __init__(self):
        super().__init__()
        self.kept = 0

    def commit(self, view):
        self.kept += 1


@pytest.fixture(autouse=True)
def _terms(monkeypatch):
    monkeypatch.setitem(TERMS._factories, "given", Given)
    monkeypatch.setitem(TERMS._factories, "remembering", Remembering)


def term(**options):
    return TERMS.build("exponential_increment", {"of": "given", **options}, where="test")


def view_of(value):
    images = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    seen = Observation(logits=torch.zeros(1, 2))
    return View(images=images, targets=None, teacher=seen, observe=lambda _: seen)


@pytest.mark.parametrize("refresh", [1, 2, 3])
def test_increment_is_over_zero_at_first_and_then_over_the_value_at_the_last_refresh(refresh):
    increment, values = term(refresh=refresh), [0.5, 0.25, 2.0, -1.0, 0.125, 3.0, 1.0]
    references = [0.0, *(values[step // refresh * refresh] for step in range(len(values) - 1))]
    for value, reference in zip(values, references, strict=True):
        assert increment(view_of(value)).item() == pytest.approx(math.exp(value - reference))


def test_gradient_of_an_increment_is_that_of_the_term_times_the_increment_and_the_reference_has_none():
    increment = term(refresh=1)
    first = torch.tensor(0.5, requires_grad=True)
    increment(view_of(first))
    second = torch.tensor(2.0, requires_grad=True)
    increment(view_of(second)).backward()
    assert second.grad.item() == pytest.approx(math.exp(1.5))
    assert first.grad is None


def test_beyond_its_limit_an_increment_goes_on_as_a_straight_line():
    value = torch.tensor(500.0, requires_grad=True)
    found = term(limit=3.0)(view_of(value))
    found.backward()
    assert found.item() == pytest.approx(math.exp(3) * (1 + 497), rel=1e-6)
    assert value.grad.item() == pytest.approx(math.exp(3), rel=1e-6)


def test_increment_reads_what_the_term_inside_reads():
    assert term(of="activation").taps == {Need.FEATURES}
    assert term(of={"kind": "activation", "layer": "body.0"}).taps == {Layer("body.0")}
    assert term(of={"kind": "bn_moments", "scope": "class"}).taps == {Need.CLASS_MOMENTS}
    assert (term(of="cross_entropy").needs_targets, term(of="one_hot").needs_targets) == (True, False)


def test_increment_is_no_mean_over_images_whatever_is_inside():
    assert TERMS.build("one_hot", {}, where="test").is_per_image
    assert not term(of="one_hot").is_per_image


def test_term_inside_an_increment_is_told_of_kept_batches_and_one_that_does_not_care_is_not_asked():
    increment = term(of="remembering")
    assert increment.remembers
    increment.commit(view_of(1.0))
    assert increment.of.kept == 1
    assert not term(of="given").remembers


def test_increment_of_a_term_about_the_student_needs_one(tmp_path):
    objective = "synthesis.objective=[one_hot, {term: exponential_increment, of: logit_gap}]"
    assert asks_student(toy_recipe(tmp_path, [objective]))
    spec = TermSpec.model_validate({"term": "exponential_increment", "of": "logit_gap"})
    with pytest.raises(RecipeError, match="exponential_increment needs the student, but nobody trains one"):
        build_objective([spec], has_targets=True, absent={Need.STUDENT: "but nobody trains one"})
    rests = build_objective([spec], has_targets=True, offers={Need.STUDENT})
    assert not rests(replace(toy_view(), student=None)).parts, "it rests where there is none yet"


@pytest.mark.parametrize(
    ("of", "message"),
    [
        ("one_hut", "synthesis.objective[0].of: unknown term 'one_hut'; did you mean one_hot?"),
        ("{kind: cross_entropy, temperatur: 2}", "synthesis.objective[0].of.temperatur: unknown key; did you mean"),
        ("{kind: bn_moments, form: l3}", 'synthesis.objective[0].of.form is "l3": input should be'),
        ("{term: one_hot}", "synthesis.objective[0].of.kind is required and missing"),
    ],
)
def test_mistake_in_the_term_inside_is_found_without_building_it(tmp_path, of, message):
    recipe = toy_recipe(tmp_path, [f"synthesis.objective=[{{term: exponential_increment, of: {of}}}]"])
    with pytest.raises(RecipeError) as error:
        static_check(recipe)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_step_and_reference_survive_a_checkpoint():
    increment, other = term(refresh=2), term(refresh=2)
    for value in (1.0, 2.0, 3.0, 4.0):
        increment(view_of(value))
    other.load_state_dict(increment.state_dict())
    assert [other(view_of(5.0)).item(), other(view_of(5.0)).item()] == pytest.approx([math.exp(2), 1.0])


def test_each_unit_begins_without_a_reference(tmp_path):
    objective = "synthesis.objective=[{term: exponential_increment, of: {kind: cross_entropy}, refresh: 2}]"
    used = build_synthesizer(toy_recipe(tmp_path, [objective]), batchnorm_teacher(), torch.device("cpu"))
    unit = unit_of((0, 1), 3)
    first, again = (joined(list(used.produce(unit.request, lambda _: None))) for _ in range(2))
    assert torch.equal(first.images, again.images)
