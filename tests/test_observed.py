from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from toy import CLASSES, PlainNet, batchnorm_teacher, toy_images

from raydfkd.frozen import LayerMoments, StemConvolution, specialize
from raydfkd.networks import SmallResNet
from raydfkd.observed import Need, ObservedNetwork
from raydfkd.registry import RecipeError

MOMENTS = frozenset({Need.MOMENTS})


class MixedNet(nn.Module):
    """BatchNorm of maps without affine weights, one that stores nothing, and BatchNorm of vectors."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 5, 3, padding=1), nn.BatchNorm2d(5, affine=False), nn.ReLU(inplace=True)),
            *(nn.Conv2d(5, 3, 3, stride=2), nn.BatchNorm2d(3, track_running_stats=False), nn.Tanh(), nn.Flatten()),
            *(nn.Linear(27, 7), nn.BatchNorm1d(7), nn.Dropout(0.5)),
        )
        self.head = nn.Linear(7, CLASSES)

    def forward(self, images):
        return self.head(self.body(images))


def trained(network):
    for _ in range(10):
        network(1.5 * torch.randn(32, 1, 8, 8) + 0.3)
    return network.eval()


@pytest.fixture(params=["convnet", "resnet", "mixed"])
def teacher(request):
    torch.manual_seed(0)
    if request.param == "convnet":
        return batchnorm_teacher()
    return trained(SmallResNet(CLASSES, 1, depth=8, width=4) if request.param == "resnet" else MixedNet())


def storing_layers(network):
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    return [module for module in network.modules() if isinstance(module, kinds) and module.running_mean is not None]


def batchnorm_inputs(network, images):
    """Each layer and its input, caught by hooks in the order of the forward pass."""
    caught = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, given: caught.append((layer, given[0])))
        for layer in storing_layers(network)
    ]
    logits = network(images)
    for hook in hooks:
        hook.remove()
    return logits, caught


def var_mean(x):
    return torch.var_mean(x, [dim for dim in range(x.ndim) if dim != 1], correction=0)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_moments_are_those_of_each_group_of_the_real_batchnorm_inputs(teacher, groups):
    images = toy_images(6)
    seen = ObservedNetwork(teacher, taps=MOMENTS, frozen=True)(images, groups=groups)
    _, caught = batchnorm_inputs(teacher, images)
    assert len(seen.moments) == len(storing_layers(teacher))
    for found, (layer, x) in zip(seen.moments, caught, strict=True):
        expected = [var_mean(part) for part in x.chunk(groups)]
        torch.testing.assert_close(found.mean, torch.stack([mean for _, mean in expected]), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.var, torch.stack([var for var, _ in expected]), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.running_mean, layer.running_mean, rtol=0, atol=0)
        torch.testing.assert_close(found.running_var, layer.running_var, rtol=0, atol=0)


def test_pooled_moments_of_the_groups_are_those_of_the_whole_batch(teacher):
    images = toy_images(6)
    seen = ObservedNetwork(teacher, taps=MOMENTS, frozen=True)(images, groups=3)
    _, caught = batchnorm_inputs(teacher, images)
    for found, (_, x) in zip(seen.moments, caught, strict=True):
        var, mean = var_mean(x)
        torch.testing.assert_close(found.pooled().mean, mean[None], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.pooled().var, var[None], rtol=1e-4, atol=1e-6)


def test_pooling_one_group_changes_nothing():
    one = LayerMoments(
        mean=torch.randn(1, 3), var=torch.rand(1, 3), running_mean=torch.zeros(3), running_var=torch.ones(3)
    )
    assert one.pooled() is one


def test_variance_keeps_its_digits_beside_a_mean_ten_times_the_deviation():
    x = 10 + torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(768, 2)).eval()
    (found,) = ObservedNetwork(network, taps=MOMENTS, frozen=True)(x).moments
    var, _ = var_mean(x.double())
    torch.testing.assert_close(found.var[0].double(), var, rtol=1e-4, atol=0)


def test_variance_of_a_constant_input_is_not_negative():
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 2)).eval()
    (found,) = ObservedNetwork(network, taps=MOMENTS, frozen=True)(torch.full((5, 1, 8, 8), 3.7)).moments
    assert 0 <= found.var.item() < 1e-4


@pytest.mark.parametrize("taps", [frozenset(), MOMENTS, frozenset({Need.FEATURES}), frozenset(Need)], ids=str)
def test_observing_does_not_change_the_answer(teacher, taps):
    images = toy_images(6)
    seen = ObservedNetwork(teacher, taps=taps, frozen=True)(images, groups=2)
    torch.testing.assert_close(seen.logits, teacher(images), rtol=1e-4, atol=1e-5)


def test_gradient_for_the_images_is_that_of_the_plain_network_in_float64(teacher):
    images, groups, targets = toy_images(6), 2, torch.arange(6) % CLASSES
    seen = ObservedNetwork(teacher, taps=MOMENTS, frozen=True)(images, groups=groups)
    value = nn.functional.cross_entropy(seen.logits, targets)
    for layer in seen.moments:
        value = value + (layer.mean - layer.running_mean).square().sum() + (layer.var - layer.running_var).abs().sum()
    (gradient,) = torch.autograd.grad(value, images)

    exact = images.detach().double().requires_grad_()
    logits, caught = batchnorm_inputs(copy.deepcopy(teacher).double(), exact)
    expected_value = nn.functional.cross_entropy(logits, targets)
    for layer, x in caught:
        for part in x.chunk(groups):
            var, mean = var_mean(part)
            expected_value = expected_value + (mean - layer.running_mean).square().sum()
            expected_value = expected_value + (var - layer.running_var).abs().sum()
    (expected,) = torch.autograd.grad(expected_value, exact)
    torch.testing.assert_close(value.double(), expected_value, rtol=1e-5, atol=0)
    assert (gradient - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("part", ["logits", "moments"])
def test_gradient_is_right_where_only_the_answer_or_only_the_moments_are_used(teacher, part):
    def value_of(logits, moments):
        return logits.square().sum() if part == "logits" else sum(mean.sum() + var.sum() for var, mean in moments)

    images = toy_images(6)
    seen = ObservedNetwork(teacher, taps=MOMENTS, frozen=True)(images)
    (gradient,) = torch.autograd.grad(value_of(seen.logits, [(one.var, one.mean) for one in seen.moments]), images)
    exact = images.detach().double().requires_grad_()
    logits, caught = batchnorm_inputs(copy.deepcopy(teacher).double(), exact)
    (expected,) = torch.autograd.grad(value_of(logits, [var_mean(x) for _, x in caught]), exact)
    assert (gradient - expected).norm() / expected.norm() < 1e-5


def test_frozen_network_is_a_copy_and_the_original_stays_as_it_was(teacher):
    teacher.train()
    state = copy.deepcopy(teacher.state_dict())
    kinds = [type(module) for module in teacher.modules()]
    observed = ObservedNetwork(teacher, taps=frozenset({Need.MOMENTS, Need.FEATURES}), frozen=True)
    observed(toy_images(6)).logits.sum().backward()
    assert [type(module) for module in teacher.modules()] == kinds
    assert teacher.training
    assert not any(module._forward_pre_hooks for module in teacher.modules())
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())


def test_backward_pass_through_a_frozen_network_reaches_the_images_and_no_weight(teacher):
    images = toy_images(6)
    observed = ObservedNetwork(teacher, frozen=True)
    observed(images).logits.sum().backward()
    assert images.grad.abs().max() > 0
    assert not any(weight.requires_grad or weight.grad is not None for weight in observed._module.parameters())


def test_frozen_network_says_the_same_twice_and_learns_nothing_from_it(teacher):
    observed = ObservedNetwork(teacher, taps=MOMENTS, frozen=True)
    first = observed(toy_images(6))
    observed(10 * toy_images(6, seed=1))
    again = observed(toy_images(6))
    torch.testing.assert_close(again.logits, first.logits, rtol=0, atol=0)
    for one, other in zip(first.moments, again.moments, strict=True):
        torch.testing.assert_close(one.running_mean, other.running_mean, rtol=0, atol=0)
        torch.testing.assert_close(one.mean, other.mean, rtol=0, atol=0)


def test_features_are_the_input_of_the_last_linear_layer(teacher):
    caught = []
    hook = teacher.head.register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    teacher(toy_images(6))
    hook.remove()
    seen = ObservedNetwork(teacher, taps=frozenset({Need.FEATURES}), frozen=True)(toy_images(6))
    torch.testing.assert_close(seen.features, caught[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(teacher.head(seen.features), seen.logits, rtol=1e-4, atol=1e-5)


def test_only_what_was_asked_for_is_observed(teacher):
    seen = ObservedNetwork(teacher, frozen=True)(toy_images(6))
    assert seen.features is None
    assert seen.moments == ()


def test_teacher_without_a_linear_layer_has_no_features():
    network = nn.Sequential(nn.Conv2d(1, CLASSES, 8), nn.Flatten())
    with pytest.raises(RecipeError, match="no final linear layer"):
        ObservedNetwork(network, taps=frozenset({Need.FEATURES}), frozen=True)


@pytest.mark.parametrize("network", [PlainNet(), nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False))])
def test_teacher_without_stored_moments_cannot_be_asked_for_them(network):
    with pytest.raises(RecipeError, match="no BatchNorm layer"):
        ObservedNetwork(network, taps=MOMENTS, frozen=True)


def test_bfloat16_gives_float32_answers_and_moments_close_to_those_of_float32(teacher):
    images = toy_images(6)
    taps = frozenset({Need.MOMENTS, Need.FEATURES})
    half = ObservedNetwork(teacher, taps=taps, frozen=True, precision=torch.bfloat16)(images, groups=2)
    full = ObservedNetwork(teacher, taps=taps, frozen=True)(images, groups=2)
    assert half.logits.dtype == half.features.dtype == torch.float32
    assert not torch.equal(half.logits, full.logits)
    torch.testing.assert_close(half.logits, full.logits, rtol=0.05, atol=0.05)
    for found, expected in zip(half.moments, full.moments, strict=True):
        assert found.mean.dtype == found.var.dtype == torch.float32
        torch.testing.assert_close(found.mean, expected.mean, rtol=0.05, atol=0.05)
        torch.testing.assert_close(found.var, expected.var, rtol=0.05, atol=0.05)
    (gradient,) = torch.autograd.grad(half.logits.sum() + sum(one.var.sum() for one in half.moments), images)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_live_student_normalises_by_running_statistics_unless_told_otherwise():
    student, images = batchnorm_teacher().train(), toy_images(6)
    state = copy.deepcopy(student.state_dict())
    seen = ObservedNetwork(student, frozen=False)(images)
    assert student.training
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    torch.testing.assert_close(seen.logits, copy.deepcopy(student).eval()(images))


def test_live_student_with_batch_statistics_trains_as_usual():
    student, images = batchnorm_teacher().train(), toy_images(6)
    expected = copy.deepcopy(student)(images)
    before = student.body[0][1].running_mean.clone()
    seen = ObservedNetwork(student, frozen=False, batchnorm="batch")(images)
    torch.testing.assert_close(seen.logits, expected)
    assert not torch.equal(student.body[0][1].running_mean, before)
    seen.logits.sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_stem_of_a_frozen_network_has_the_input_gradient_of_the_plain_convolution():
    torch.manual_seed(0)
    for channels, stride, padding, dilation in ((1, 2, 1, 1), (3, 1, 0, 1), (3, 2, 3, 2)):
        layer = nn.Conv2d(channels, 5, 3, stride=stride, padding=padding, dilation=dilation).double()
        images = torch.randn(2, channels, 12, 11, dtype=torch.float64)
        weights = torch.randn_like(layer(images))
        gradients = []
        for network in (layer, StemConvolution(layer.requires_grad_(False))):
            leaf = images.clone().requires_grad_()
            (network(leaf) * weights).sum().backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(gradients[1], gradients[0])


def test_only_plain_convolutions_of_few_channels_are_replaced():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3, padding="same"))
    special = specialize(network, moments=None)
    assert [type(layer) for layer in special] == [StemConvolution, nn.Conv2d, nn.Conv2d]
