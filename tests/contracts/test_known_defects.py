"""Defects of released code that were found by reading it: each has a test that they are not here."""

from __future__ import annotations

import pytest
import torch
from toy import (
    SPACE,
    SYNTHESIZERS_UNDER_TEST,
    batches_of,
    batchnorm_teacher,
    joined,
    plain_teacher,
    toy_images,
    toy_recipe,
    unit_of,
)

from raydfkd.config.schema import TermSpec
from raydfkd.images.pixels import PixelRange, nominal_to_uint8
from raydfkd.losses.objective import TERMS, Term, View, build_objective, terms_that_need
from raydfkd.networks.observed import Need, Observation, ObservedNetwork
from raydfkd.networks.optimizers import warmup_cosine
from raydfkd.seeds import derive_seed, rng_from
from raydfkd.synthesis.build import build_synthesizer
from raydfkd.synthesis.judge import Judge
from raydfkd.synthesis.student_feed import LiveStudentFeed

CPU = torch.device("cpu")


def build(name, **options):
    return TERMS.build(name, options, where="test")


def value_of(term, *, images=None, teacher=None, student=None):
    """Of images, or of answers [N, K]."""
    images = torch.zeros(len(teacher), 1, 2, 2) if images is None else images
    seen = Observation(logits=torch.zeros(len(images), 2) if teacher is None else teacher)
    answer = None if student is None else Observation(logits=student)
    return term(View(images=images, targets=None, teacher=seen, observe=lambda _: seen, student=answer))


@pytest.mark.parametrize("term", [build("total_variation", norm="l2"), build("image_l2")], ids=["variation", "l2"])
def test_norm_is_not_taken_over_the_whole_batch(term):
    """DeepInversion takes one norm over all images, so its weight is a matter of the batch size: a root of 2 here."""
    images = toy_images(4).detach()
    torch.testing.assert_close(value_of(term, images=torch.cat([images, images])), value_of(term, images=images))


def test_divergence_of_student_and_teacher_is_to_their_mixture_and_not_from_it():
    """Adaptive DeepInversion's code exchanges the arguments of both divergences: opposite answers make it infinite."""
    student, teacher = torch.tensor([[3.0, 0.0, -1.0]]), torch.tensor([[-1.0, 2.0, 0.5]])
    one, other = (logits.double().softmax(1) for logits in (student, teacher))
    mixture = (one + other) / 2
    expected = 1 - sum((answer * (answer / mixture).log()).sum() / 2 for answer in (one, other))
    reversed_ = 1 - sum((mixture * (mixture / answer).log()).sum() / 2 for answer in (one, other))
    found = value_of(build("competition", temperature=1.0), student=student, teacher=teacher)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert abs(found.item() - reversed_.item()) > 0.1


def test_divergence_of_student_and_teacher_is_not_clamped():
    """There, probabilities are clamped to [0.01, 0.99]: of 1000 classes none is left with a gradient."""
    rng = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 1000, generator=rng).requires_grad_() for _ in range(2))
    assert (student / 3).softmax(1).max() < 0.01
    for gradient in torch.autograd.grad(value_of(build("competition"), student=student, teacher=teacher), student):
        assert (gradient.abs() > 0).all()


@pytest.mark.parametrize("name", terms_that_need(Need.STUDENT))
def test_adversarial_term_asks_the_student_and_not_the_teacher_twice(name):
    """Where the teacher is passed for the student the term is a constant; where weights are live they are trained."""
    objective = build_objective([TermSpec.model_validate(name)], has_targets=False, offers={Need.STUDENT})
    teacher, student = batchnorm_teacher(), plain_teacher(seed=1)
    observed = ObservedNetwork(teacher, taps=objective.needs, frozen=True)
    judge = Judge(teacher=observed, objective=objective, pixels=PixelRange(SPACE), student=LiveStudentFeed(student))
    images = toy_images(32)
    _, value = judge(images, None)
    value.total.backward()
    assert images.grad.norm() > 1e-4
    assert all(weights.grad is None for network in (teacher, student) for weights in network.parameters())
    twin = Judge(teacher=observed, objective=objective, pixels=PixelRange(SPACE), student=LiveStudentFeed(teacher))
    same = toy_images(32)
    _, value = twin(same, None)
    value.total.backward()
    assert same.grad.norm() < 1e-3 * images.grad.norm(), "a student like the teacher leaves nothing to seek"


def test_images_that_are_kept_are_the_last_iterate_and_no_alias_of_a_best_one(monkeypatch, tmp_path):
    """CMI keeps ``.data`` of the best iterate, which the optimiser goes on to change: neither the best nor the last."""
    iterates = []

    class Brightness(Term):
        """Its gradient is the same everywhere, so that Adam moves each pixel by the rate; its value gets worse."""

        def forward(self, view):
            iterates.append(view.images.detach().clone())
            return -view.images.mean() + 100 * view.progress

    monkeypatch.setitem(TERMS._factories, "brightness", Brightness)
    steps, lr = 5, 0.3
    overrides = [
        "synthesis.objective=[brightness]",
        f"synthesis.stages=[{{steps: {steps}}}]",
        f"synthesis.lr={lr}",
        "synthesis.warmup=0",
        "synthesis.augment=[]",
        "synthesis.clip=false",
    ]
    kept = joined(batches_of(toy_recipe(tmp_path, overrides), unit_of((0,), 2)))
    assert len(iterates) == steps
    last = iterates[-1] + lr * warmup_cosine(steps - 1, steps=steps, warmup=0)
    difference = kept.images.int() - nominal_to_uint8(last).int()
    assert difference.abs().max() <= 1, "but for the rounding of a grey level"
    assert not torch.equal(kept.images, nominal_to_uint8(iterates[0])), "which had the best value"
    assert not torch.equal(kept.images, nominal_to_uint8(iterates[-1])), "which was judged last"


@pytest.mark.parametrize("synthesizer", SYNTHESIZERS_UNDER_TEST)
def test_seed_of_a_unit_is_not_that_of_its_device(tmp_path, synthesizer):
    """Where the seed is the device's index, every unit that a device makes is the same, and so is every run."""
    recipe = toy_recipe(tmp_path, ["transfer_set.unit.classes=4"], synthesizer=synthesizer)
    first, second = recipe.plan()[:2]
    assert first.request.classes == second.request.classes
    used = build_synthesizer(recipe, batchnorm_teacher(), CPU)
    one, other = (joined(list(used.produce(unit.request, lambda _: None))) for unit in (first, second))
    assert not any(torch.equal(image, twin) for image in one.images for twin in other.images)
    elsewhere = toy_recipe(tmp_path / "elsewhere", ["transfer_set.unit.classes=4", "seed=8"], synthesizer=synthesizer)
    assert elsewhere.plan()[0].request.seed != first.request.seed


def test_latents_are_not_drawn_from_the_seed_of_the_generator_s_weights(tmp_path):
    """Drawn from one seed, the first latents are a function of the first layer's weights."""
    recipe = toy_recipe(tmp_path, synthesizer="generator")
    synthesizer = build_synthesizer(recipe, batchnorm_teacher(), CPU)
    request = unit_of((0, 1), 3).request
    one, other = (synthesizer.training(request, rank=rank) for rank in (0, 1))
    for weights, twin in zip(one._stack.parameters(), other._stack.parameters(), strict=True):
        assert torch.equal(weights, twin), "both ranks train one generator"
    mine, theirs = one._latents(), other._latents()
    assert not torch.equal(mine, theirs), "but from latents of their own"
    used = {seed for base in request.class_seeds for seed in (base, derive_seed(base, "weights"))} | {request.seed}
    for seed in used:
        drawn = torch.randn(mine.shape[1:], generator=rng_from(seed))
        assert not any(torch.equal(latents, drawn) for latents in mine)
    assert not torch.equal(mine[0], mine[1]), "each generator has latents of its own"
