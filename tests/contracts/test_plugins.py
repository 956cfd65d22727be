from __future__ import annotations

import pytest
import torch
from toy import CLASSES, FAMILIES, SPACE, batchnorm_teacher, shipped, variants

from raydfkd.config.schema import ImageSpace, TeacherSpec
from raydfkd.distillation.criteria import CRITERIA
from raydfkd.images.augment import AUGMENTATIONS
from raydfkd.networks.build import NETWORKS, PRUNED_TEACHER, build_network
from raydfkd.networks.generators import GENERATORS
from raydfkd.networks.inside import TeacherInside
from raydfkd.networks.observed import Observation
from raydfkd.seeds import rng_from
from raydfkd.synthesis.targets import TARGETS

STRONG = {
    "jitter": {"pixels": 2},
    "flip": {"probability": 1.0},
    "affine": {"degrees": 20.0, "scale": 0.2, "shift": 0.2},
    "noise": {"std": 0.5},
    "color_jitter": {"brightness": 0.5, "contrast": 0.5},
    "crop": {"pixels": 2},
}
"""Options with which an augmentation certainly does something; those that are not here need none."""
TARGET_OPTIONS = {"gaussian": {"std": 2.0}}
"""Options that target samplers require."""
WHOLE_NETWORKS = [name for name in shipped(NETWORKS) if name != PRUNED_TEACHER]
SMALL = {"resnet_small": {"depth": 8, "width": 4}, "convnet": {"widths": [4, 8]}}
PLUGINS = [(family, name) for family, registry in FAMILIES.items() for name in shipped(registry)]
OF_MAPS = {name: {"student": "maps", "teacher": "maps"} for name in ("activation_boundary", "attention_transfer")}
CRITERIA_CASES = [
    *((name, options) for name in shipped(CRITERIA) for options in variants(CRITERIA, name)),
    *OF_MAPS.items(),
]
ANSWER_CASES = [case for case in CRITERIA_CASES if case[0] not in ("hard_labels", "activation_boundary")]
"""Those whose least value is zero, where student and teacher are alike."""
PER_IMAGE_CASES = [case for case in CRITERIA_CASES if case[0] != "relational"]


def augmentation(name):
    return AUGMENTATIONS.build(name, STRONG.get(name, {}), where="test")


def images(count=5, channels=3, size=8, seed=0):
    return torch.rand(count, channels, size, size, generator=rng_from(seed))


def targets_of(name):
    inside = TeacherInside(batchnorm_teacher(), SPACE.shape, torch.device("cpu"))
    return TARGETS.build(name, TARGET_OPTIONS.get(name, {}), inside, where="test")


def logits(seed, count=6):
    return torch.randn(count, CLASSES, generator=rng_from(seed))


def criterion_value(case, student, teacher, labels):
    criterion = CRITERIA.build(case[0], case[1], where="test")
    return criterion(observation(student), observation(teacher), labels)


def observation(answer):
    """What a network says whose layers are what it answers."""
    return Observation(logits=answer, features=answer, layers={"maps": answer.view(len(answer), 1, 2, 2)})


@pytest.mark.parametrize(("family", "name"), PLUGINS)
def test_plugin_says_in_one_line_what_it_is_and_what_each_option_means(family, name):
    meaning, options = FAMILIES[family].describe(name)
    first = meaning.partition("\n")[0]
    assert 10 < len(first) <= 120
    assert first[-1] in ".;:"
    assert [option.name for option in options if not option.meaning] == []


@pytest.mark.parametrize("name", shipped(AUGMENTATIONS))
@pytest.mark.parametrize("count", [1, 5])
def test_augmentation_keeps_shape_and_type(name, count):
    batch = images(count)
    seen = augmentation(name)(batch, rng_from(1))
    assert (seen.shape, seen.dtype) == (batch.shape, batch.dtype)
    assert seen.isfinite().all()


@pytest.mark.parametrize("name", shipped(AUGMENTATIONS))
def test_augmentation_follows_from_its_seed_alone(name):
    batch, augment = images(), augmentation(name)
    torch.manual_seed(1)
    first = augment(batch, rng_from(1))
    torch.manual_seed(2)
    torch.testing.assert_close(augmentation(name)(batch, rng_from(1)), first, rtol=0, atol=0)


@pytest.mark.parametrize("name", shipped(AUGMENTATIONS))
def test_augmentation_leaves_its_input_and_the_global_random_numbers_alone(name):
    batch = images()
    before, state = batch.clone(), torch.get_rng_state()
    augmentation(name)(batch, rng_from(1))
    torch.testing.assert_close(batch, before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", shipped(AUGMENTATIONS))
def test_augmentation_changes_the_images_for_some_seed(name):
    batch, augment = images(), augmentation(name)
    assert any(not torch.equal(augment(batch, rng_from(seed)), batch) for seed in range(5))


@pytest.mark.parametrize("name", shipped(AUGMENTATIONS))
def test_gradient_passes_through_an_augmentation_to_every_image(name):
    batch = images().requires_grad_()
    (gradient,) = torch.autograd.grad(augmentation(name)(batch, rng_from(1)).square().sum(), batch)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize("case", CRITERIA_CASES, ids=str)
def test_criterion_is_a_finite_scalar_with_a_gradient_for_the_student(case):
    student = logits(0).requires_grad_()
    value = criterion_value(case, student, logits(1), torch.arange(6) % CLASSES)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.shape == ()
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert (gradient.abs().amax(1) > 0).all()


@pytest.mark.parametrize("case", ANSWER_CASES, ids=str)
def test_criterion_is_zero_for_a_student_that_answers_like_the_teacher(case):
    value = criterion_value(case, logits(0), logits(0), torch.arange(6) % CLASSES)
    torch.testing.assert_close(value, torch.tensor(0.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ANSWER_CASES, ids=str)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_criterion_is_positive_for_a_student_that_answers_otherwise(case, seed):
    assert criterion_value(case, logits(seed), logits(0), torch.arange(6) % CLASSES) > 0.01


def test_every_criterion_is_among_the_cases():
    assert {name for name, _ in CRITERIA_CASES} == set(shipped(CRITERIA))


@pytest.mark.parametrize("case", PER_IMAGE_CASES, ids=str)
def test_criterion_is_a_mean_over_images(case):
    student, teacher, labels = logits(0), logits(1), torch.arange(6) % CLASSES
    twice = criterion_value(case, student.repeat(2, 1), teacher.repeat(2, 1), labels.repeat(2))
    torch.testing.assert_close(twice, criterion_value(case, student, teacher, labels))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", WHOLE_NETWORKS)
def test_network_answers_one_logit_a_class(name, channels):
    space = ImageSpace(channels=channels, size=32, mean=(0.5,) * channels, std=(0.5,) * channels)
    spec = TeacherSpec(network=name, options=SMALL.get(name, {}), classes=7, image_space=space)
    network = build_network(spec, spec, where="teacher", seed=0)
    assert network(torch.randn(3, channels, 32, 32)).shape == (3, 7)


@pytest.mark.parametrize("name", WHOLE_NETWORKS)
def test_weights_of_a_network_follow_from_the_seed_alone(name):
    space = ImageSpace(channels=1, size=32, mean=(0.5,), std=(0.5,))
    spec = TeacherSpec(network=name, options=SMALL.get(name, {}), classes=7, image_space=space)
    torch.manual_seed(1)
    one = build_network(spec, spec, where="teacher", seed=0).state_dict()
    torch.manual_seed(2)
    same, other = (build_network(spec, spec, where="teacher", seed=seed).state_dict() for seed in (0, 1))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", shipped(GENERATORS))
def test_generator_makes_images_between_black_and_white(name, channels):
    space = ImageSpace(channels=channels, size=8, mean=(0.5,) * channels, std=(0.5,) * channels)
    generator = GENERATORS.build(name, {}, space, where="test")
    made = generator(torch.randn(5, generator.latent))
    assert made.shape == (5, channels, 8, 8)
    assert made.min() >= 0
    assert made.max() <= 1
    assert made.std(0).mean() > 1e-3


@pytest.mark.parametrize("name", shipped(GENERATORS))
def test_generator_has_no_state_but_its_weights(name):
    generator = GENERATORS.build(name, {}, SPACE, where="test")
    assert list(generator.buffers()) == []
    latents = torch.randn(4, generator.latent)
    torch.testing.assert_close(generator(latents), generator(latents), rtol=0, atol=0)


@pytest.mark.parametrize("name", shipped(TARGETS))
def test_targets_are_class_major_and_as_many_as_asked_for(name):
    sampler = targets_of(name)
    targets = sampler((2, 0), 3, [rng_from(1), rng_from(2)])
    if sampler.is_soft:
        assert targets.shape == (6, CLASSES)
        assert targets.dtype == torch.float32
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        targets = targets.argmax(1)
    if sampler.is_conditional:
        assert targets.tolist() == [2, 2, 2, 0, 0, 0]
    else:
        assert targets is None


@pytest.mark.parametrize("name", [name for name in shipped(TARGETS) if targets_of(name).is_conditional])
def test_targets_of_a_class_do_not_depend_on_who_shares_its_pack(name):
    sampler = targets_of(name)
    both = sampler((2, 0), 3, [rng_from(1), rng_from(2)])
    alone = [sampler((label,), 3, [rng_from(seed)]) for label, seed in ((2, 1), (0, 2))]
    assert torch.equal(both, torch.cat(alone))
    assert torch.equal(sampler((2, 0), 3, [rng_from(1), rng_from(2)]), both)
