"""Generators whose steps somebody else makes: what an online source holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy import (
    CLASSES,
    SPACE,
    SYNTHESIZERS_UNDER_TEST,
    assert_same_rows,
    batchnorm_teacher,
    joined,
    toy_recipe,
    unit_of,
)

from raydfkd.networks.generators import ConvGenerator
from raydfkd.networks.small import ConvNet
from raydfkd.networks.teacher import open_teacher
from raydfkd.synthesis.build import build_synthesizer
from raydfkd.synthesis.student_feed import LiveStudentFeed

CPU = torch.device("cpu")
DFAD = ("targets=none", "objective=[logit_gap]", "batch_per_class=6", "emissions=1", "augment=[]", "lr=0.02")


def training_of(folder, *settings, student=None, classes=(0, 1), **arguments):
    recipe = toy_recipe(folder, [f"synthesis.{setting}" for setting in settings], synthesizer="generator")
    synthesizer = build_synthesizer(recipe, batchnorm_teacher(), CPU, LiveStudentFeed(student or student_net()))
    return synthesizer.training(unit_of(classes, 1).request, **arguments)


def student_net(seed=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConvNet(CLASSES, 1, widths=(4, 6)).train()


def state_of(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def test_generator_learns_what_the_student_does_not_know(tmp_path):
    training = training_of(tmp_path, *DFAD)
    values = [training.update().total.item() for _ in range(40)]
    assert sum(values[-5:]) < 1.2 * sum(values[:5]), "the gap is negative and grows"


def test_step_against_a_student_leaves_the_student_as_it_was(tmp_path):
    student = student_net()
    before, modes = state_of(student), [module.training for module in student.modules()]
    training = training_of(tmp_path, *DFAD, student=student)
    training.update()
    training.update(LiveStudentFeed(student, batchnorm="running"))
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())
    assert [module.training for module in student.modules()] == modes


def test_live_student_is_asked_with_the_weights_that_it_has_now(tmp_path):
    student, images = student_net(), torch.randn(5, 1, 8, 8)
    feed = LiveStudentFeed(student)
    first = feed(images).logits
    with torch.no_grad():
        student.head.bias += 1
    torch.testing.assert_close(feed(images).logits, first + 1)


@pytest.mark.parametrize("batchnorm", ["batch", "running"])
def test_live_student_normalises_by_the_batch_or_by_its_running_statistics(batchnorm):
    student, images = student_net(), torch.randn(5, 1, 8, 8, requires_grad=True)
    found = LiveStudentFeed(student, batchnorm=batchnorm)(images).logits
    (gradient,) = torch.autograd.grad(found.square().sum(), images)
    expected = student.train(batchnorm == "batch")(images)
    torch.testing.assert_close(found, expected)
    (direct,) = torch.autograd.grad(expected.square().sum(), images)
    torch.testing.assert_close(gradient, direct, rtol=1e-4, atol=1e-5)


def test_module_in_eval_inside_a_student_in_training_stays_in_eval():
    student = student_net()
    frozen = next(module for module in student.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    LiveStudentFeed(student, batchnorm="running")(torch.randn(2, 1, 8, 8))
    assert (student.training, frozen.training) == (True, False)


@pytest.mark.parametrize("n", [1, 5, 6, 13])
def test_as_many_images_are_drawn_as_a_step_of_the_student_takes(tmp_path, n):
    made = training_of(tmp_path, *DFAD).sample(n)
    assert len(made) == n
    assert made.labels.tolist() == made.teacher_logits.argmax(1).tolist()


def test_classes_take_turns_at_having_an_image_less(tmp_path):
    training = training_of(tmp_path, "conditional=true", classes=(0, 1, 2))
    counts = [training.sample(4).labels.bincount(minlength=3) for _ in range(6)]
    assert {tuple(count.tolist()) for count in counts} == {(2, 1, 1), (1, 2, 1), (1, 1, 2)}
    assert sum(counts).tolist() == [8, 8, 8]


def test_drawing_before_a_step_and_between_steps_gives_fresh_images(tmp_path):
    training = training_of(tmp_path, *DFAD)
    first, again = training.sample(6), training.sample(6)
    training.update()
    later = training.sample(6)
    assert not torch.equal(first.images, again.images)
    assert not torch.equal(again.images, later.images)
    assert (first.objective, later.objective != 0) == (0, True)


@pytest.mark.parametrize("settings", [DFAD, ("conditional=true", "emissions=1", "renewal={steps: 2, latent_lr: 0.1}")])
def test_training_that_goes_on_from_its_state_makes_the_same_images(tmp_path, settings):
    undisturbed, left = (training_of(tmp_path, *settings, student=student_net()) for _ in range(2))
    for training in (undisturbed, left):
        training.update()
        training.sample(5)
    taken_up = training_of(tmp_path, *settings, student=student_net())
    taken_up.load_state_dict(left.state_dict())
    for training in (undisturbed, taken_up):
        training.sample(3)
        training.update()
    assert taken_up.step == undisturbed.step == 2
    assert torch.equal(taken_up.sample(7).images, undisturbed.sample(7).images)


def test_wrapper_for_data_parallelism_is_what_training_calls(tmp_path):
    calls = []

    class Wrapped(nn.Module):
        def __init__(self, stack):
            super().__init__()
            self.stack = stack

        def forward(self, latents):
            calls.append(len(latents))
            return self.stack(latents)

    training = training_of(tmp_path, *DFAD, parallel=Wrapped)
    training.update()
    training.sample(2)
    assert calls == [1]
    assert not any("stack.stack" in name for name in training.state_dict()["stack"])


def test_version_of_the_student_that_images_were_made_against_is_recorded_beside_them(tmp_path):
    feed = LiveStudentFeed(student_net())
    training = training_of(tmp_path, *DFAD)
    feed.version = 12
    training.update(feed)
    assert training.sample(2).student_version == 12


def test_unit_is_what_its_training_yields_when_the_steps_are_made_by_hand(tmp_path):
    recipe = toy_recipe(tmp_path, ["synthesis.emissions=1"], synthesizer="generator")
    teacher = open_teacher(recipe).module
    synthesizer = build_synthesizer(recipe, teacher, CPU)
    request = unit_of((0, 1), 2).request
    training = synthesizer.training(request)
    for _ in range(6):
        training.update()
    assert torch.equal(training.sample(4).images, joined(list(synthesizer.produce(request, lambda _: None))).images)


def test_latents_have_nothing_to_do_with_the_weights(tmp_path):
    """Drawn from one seed, the first latents would be functions of the first layer's weights."""
    training = training_of(tmp_path, *DFAD)
    (latents,) = training._rngs
    with torch.random.fork_rng():
        torch.manual_seed(latents.initial_seed())
        twin = ConvGenerator(SPACE, latent=4, width=4, doublings=1)
    assert not torch.equal(training.state_dict()["stack"]["stacked.0"][0], twin[0].weight)


def test_process_of_another_rank_has_the_same_weights_and_other_latents(tmp_path):
    one, other = (training_of(tmp_path, *DFAD, rank=rank) for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one._stack.parameters(), other._stack.parameters(), strict=True))
    assert not torch.equal(one.sample(6).images, other.sample(6).images)


class Random(ConvNet):
    """Draws global random numbers in eval mode too, as ``F.dropout`` without ``training=`` does."""

    def forward(self, images):
        return super().forward(torch.nn.functional.dropout(images, 0.3))


@pytest.mark.parametrize("synthesizer", SYNTHESIZERS_UNDER_TEST)
def test_network_that_draws_random_numbers_does_not_make_another_set_each_time(tmp_path, synthesizer):
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        recipe = toy_recipe(tmp_path, synthesizer=synthesizer)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            teacher = Random(CLASSES, 1, widths=(8, 12)).eval()
        made.append(
            joined(list(build_synthesizer(recipe, teacher, CPU).produce(unit_of((0, 1), 3).request, lambda _: None)))
        )
    assert_same_rows(*made)
