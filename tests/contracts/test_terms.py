from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from toy import (
    BATCHNORM_TAPS,
    REQUIRED,
    SPACE,
    attention_teacher,
    batches_of,
    batchnorm_teacher,
    plain_teacher,
    shipped,
    toy_images,
    toy_recipe,
    toy_view,
    variants,
)

from raydfkd.config.schema import TermSpec
from raydfkd.errors import RecipeError
from raydfkd.images.pixels import PixelRange
from raydfkd.losses.contrast import Contrast
from raydfkd.losses.diversity import ModeSeeking
from raydfkd.losses.objective import BESIDE_TEACHER, TERMS, Term, View, build_objective
from raydfkd.networks.attention import Attention
from raydfkd.networks.observed import MOMENTS, Layer, Need, Observation, ObservedNetwork
from raydfkd.networks.taps import FIRST_CONVOLUTION

OPEN = [
    ("activation", {"layer": "first_convolution"}),
    ("bn_moments", {"momentum": 0.9}),
    ("decision_gap", {"where": "everywhere", "temperature": 3.0, "easy_first": {"from": 50, "to": 90}}),
    ("exponential_increment", {"of": {"kind": "cross_entropy", "temperature": 2.0}, "refresh": 1}),
    ("exponential_increment", {"of": {"kind": "bn_moments", "scope": "class"}}),
    ("feature_diversity", {"within_class": True}),
    ("logit_gap", {"log": True, "easy_first": {"from": 50, "to": 90}}),
    ("logit_gap", {"standardize": True}),
]
"""Options that are no closed choice."""
CASES = [(name, options) for name in shipped(TERMS) for options in variants(TERMS, name)] + OPEN
TAPS = BATCHNORM_TAPS | {Layer(FIRST_CONVOLUTION)}


def build(name, options=None):
    term = TERMS.build(name, REQUIRED.get(name, {}) if options is None else options, where="test")
    if type(term).prepare is not Term.prepare:
        term.prepare(ObservedNetwork(teacher_for(term), taps=term.taps, frozen=True)(toy_images(2)))
    return term


def label(case):
    name, options = case
    return "-".join([name, *map(str, options.values())])


def cases(*, where=lambda term: True):
    return pytest.mark.parametrize("case", [case for case in CASES if where(build(*case))], ids=label)


def groups_for(term, images):
    if Need.IMAGE_MOMENTS in term.taps:
        return len(images)
    return 2 if Need.CLASS_MOMENTS in term.taps else 1


def teacher_for(term):
    return attention_teacher() if Need.ATTENTION in term.taps else batchnorm_teacher()


def view_for(term, images=None, targets=None):
    images = toy_images(6) if images is None else images
    taps = term.taps if Need.ATTENTION in term.taps else TAPS
    view = toy_view(images, targets, teacher=teacher_for(term), taps=taps, groups=groups_for(term, images))
    logits = view.teacher.logits
    surer = Observation(logits=2 * logits + logits.tanh())  # who decides alike, as some terms ask of an image
    return replace(view, student=surer)


@cases()
def test_term_is_a_finite_scalar(case):
    term = build(*case)
    value = term(view_for(term))
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert value.isfinite()


@cases()
def test_term_has_a_finite_gradient_for_every_image(case):
    term, images = build(*case), toy_images(6)
    targets = torch.tensor([0, 0, 1, 1, 2, 2])
    (gradient,) = torch.autograd.grad(term(view_for(term, images, targets)), images)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).abs().amax(1) > 0).all()


@cases()
def test_term_is_finite_on_constant_images(case):
    term, images = build(*case), torch.zeros(6, 1, 8, 8, requires_grad=True)
    value = term(view_for(term, images))
    (gradient,) = torch.autograd.grad(value, images)
    assert value.isfinite()
    assert gradient.isfinite().all()


@cases(where=lambda term: term.is_per_image)
def test_doubling_the_batch_leaves_a_per_image_term_unchanged(case):
    term, images = build(*case), toy_images(6)
    targets = torch.tensor([0, 1, 2, 3, 0, 1])
    once = term(view_for(term, images, targets))
    twice = term(view_for(term, torch.cat([images, images]), torch.cat([targets, targets])))
    torch.testing.assert_close(twice, once)


@cases(where=lambda term: term.is_per_image)
def test_per_image_term_is_the_mean_of_its_values_for_single_images(case):
    term, images = build(*case), toy_images(4)
    targets = torch.tensor([3, 1, 2, 0])
    singles = [term(view_for(term, images[row : row + 1], targets[row : row + 1])) for row in range(4)]
    torch.testing.assert_close(term(view_for(term, images, targets)), torch.stack(singles).mean())


@cases(where=lambda term: Need.CLASS_MOMENTS not in term.taps and not isinstance(term, (ModeSeeking, Contrast)))
def test_order_of_the_images_does_not_matter(case):
    term, images = build(*case), toy_images(6)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    targets = torch.tensor([0, 1, 2, 3, 0, 1])
    again = build(*case)(view_for(term, images[order], targets[order]))
    torch.testing.assert_close(again, term(view_for(term, images, targets)))


def attention_of(features):
    """Self-attention of two heads over eight tokens of two numbers, in the precision of ``features`` [N, 16]."""
    tokens = features.unflatten(1, (8, 2))
    heads = tokens[:, None] * torch.tensor([1.0, -2.0]).view(1, 2, 1, 1)
    maps = (heads @ heads.transpose(2, 3)).softmax(3)
    return Attention(output=(maps @ heads).transpose(1, 2).flatten(2), weights=lambda: maps, patches=slice(1, 8))


@cases(where=lambda term: not term.taps.intersection(MOMENTS) and not isinstance(term, Contrast))
def test_gradient_agrees_with_finite_differences(case):
    weights, others = torch.randn(2, 16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    targets = torch.tensor([0, 1, 0])

    def value(images):
        features = images.flatten(1)
        layers = {FIRST_CONVOLUTION: images.sin()}
        maps = (attention_of(features),)
        seen = Observation(logits=features @ weights, features=features, layers=layers, attention=maps)
        student = Observation(logits=features @ (0.9 * weights + 0.1 * others))
        assert student.logits.argmax(1).equal(seen.logits.argmax(1))
        view = View(
            images=images, targets=targets, teacher=seen, observe=lambda _: seen, student=student, seen=2 * images
        )
        return build(*case)(view)

    images = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    assert torch.autograd.gradcheck(value, images.requires_grad_())


def objective_of(name, **offers):
    spec = TermSpec.model_validate({"term": name, **REQUIRED.get(name, {})})
    return build_objective([spec], **{"has_targets": True, "offers": frozenset(Need), **offers})


@pytest.mark.parametrize("name", [name for name in shipped(TERMS) if build(name).needs_targets])
def test_term_that_needs_targets_is_refused_where_there_are_none(name):
    with pytest.raises(RecipeError, match=rf"objective\[0\]: {name} needs targets"):
        objective_of(name, has_targets=False)


@pytest.mark.parametrize("name", [name for name in shipped(TERMS) if not build(name).needs_targets])
def test_term_that_needs_no_targets_is_built_without_them(name):
    assert list(objective_of(name, has_targets=False).terms) == [name]


@pytest.mark.parametrize("need", BESIDE_TEACHER)
def test_term_is_refused_where_the_pipeline_does_not_offer_what_it_reads(monkeypatch, need):
    class Reader(Term):
        needs = frozenset({need})

    monkeypatch.setitem(TERMS._factories, "reader", Reader)
    assert objective_of("reader").needs == {need}
    with pytest.raises(
        RecipeError, match=rf"objective\[0\]: reader needs {BESIDE_TEACHER[need]}, which nothing offers"
    ):
        objective_of("reader", offers=frozenset(Need) - {need})


def test_term_that_needs_what_the_synthesizer_does_not_offer_is_told_which_ones_do(monkeypatch, tmp_path):
    class Reader(Term):
        needs = frozenset({Need.LATENTS})

        def forward(self, view):
            return view.latents.square().mean()

    monkeypatch.setitem(TERMS._factories, "reader", Reader)
    assert batches_of(toy_recipe(tmp_path / "made", ["synthesis.objective=[one_hot, reader]"], synthesizer="generator"))
    with pytest.raises(RecipeError) as error:
        batches_of(toy_recipe(tmp_path / "refused", ["synthesis.objective=[one_hot, reader]"]))
    assert str(error.value) == (
        "synthesis.objective[1]: reader needs latents, which pixels does not offer; synthesizers that do: generator"
    )


@cases(where=lambda term: bool(term.taps.intersection(MOMENTS)))
def test_term_that_needs_moments_is_refused_for_a_teacher_without_batchnorm(case):
    with pytest.raises(RecipeError, match="BatchNorm"):
        ObservedNetwork(plain_teacher(), taps=build(*case).taps, frozen=True)


@cases()
def test_term_declares_everything_it_reads(case):
    """The observation holds no more than the declared taps, so an undeclared need would fail here."""
    term, images = build(*case), toy_images(6)
    observed = ObservedNetwork(teacher_for(term), taps=term.taps, frozen=True)
    targets = torch.arange(6) % 4 if term.needs_targets else None
    groups = groups_for(term, images)
    teacher = observed(images, groups=groups)
    student = Observation(logits=plain_teacher(seed=1)(images)) if Need.STUDENT in term.taps else None
    view = View(
        images=images,
        targets=targets,
        teacher=teacher,
        observe=observed,
        student=student,
        seen=PixelRange(SPACE).from_nominal(images),
        groups=groups,
    )
    assert term(view).isfinite()


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("cross_entropy", {"temperature": 0.0}, "positive"),
        ("competition", {"temperature": -1.0}, "positive"),
        ("bn_moments", {"form": "kl", "statistic": "std"}, "statistic is std"),
        ("bn_moments", {"form": "reverse_kl", "statistic": "std"}, "statistic is std"),
        ("bn_moments", {"momentum": 0.9, "scope": "image"}, "momentum is 0.9, but scope is image"),
        ("bn_moments", {"momentum": 1.0}, "momentum"),
        ("decision_gap", {"temperature": 0.0}, "temperature"),
        ("logit_gap", {"easy_first": {"from": -1, "to": 2}}, "easy_first goes from -1.0 to 2.0"),
        ("logit_gap", {"easy_first": 3}, "easy_first"),
        ("exponential_increment", {}, "of is required"),
        ("exponential_increment", {"of": "one_hut"}, "test: of: unknown term 'one_hut'; did you mean one_hot"),
        ("exponential_increment", {"of": {"kind": "bn_moments", "form": "l3"}}, "test: of.form"),
        ("exponential_increment", {"of": {"kind": "competition", "temperature": 0.0}}, "test: of: temperature"),
        ("smoothness", {"sigma": 0.0}, "sigma"),
        ("mode_seeking", {"epsilon": 0.0}, "epsilon"),
        ("feature_diversity", {"epsilon": 0.0}, "epsilon"),
        ("bn_moments", {"form": "l3"}, "form"),
        ("total_variation", {"norm": "l3"}, "norm"),
        ("contrast", {"temperature": 0.0}, "temperature"),
        ("contrast", {"crop": 0.0}, "crop is 0.0; it must be above 0"),
        ("patch_similarity_entropy", {"bandwidth": 0.0}, "bandwidth is 0.0; it must be from 0.005 to 1"),
    ],
)
def test_option_that_makes_no_sense_is_refused_with_its_key(name, options, reason):
    with pytest.raises(RecipeError, match=reason):
        build(name, options)


def test_every_term_that_the_page_on_recipes_shows_can_be_built():
    page = (Path(__file__).parents[2] / "docs/recipes.md").read_text()
    section = page.partition("## Terms of an objective")[2].partition("\n## ")[0]
    shown = re.findall(r"`(\{term: .*?\})`", section)
    assert len(shown) >= 9
    specs = [TermSpec.model_validate({"name": str(place), **yaml.safe_load(text)}) for place, text in enumerate(shown)]
    build_objective(specs, has_targets=True, offers=frozenset(Need))
    named = re.findall(r"`([a-z_0-9]+)`", section.partition("| for |")[2].partition("\n\n")[0])
    assert {name for name in named if name != "image_space"} <= {*shipped(TERMS)}
