from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import nn
from toy import CLASSES, PlainNet, batchnorm_teacher, toy_images

from raydfkd.errors import RecipeError
from raydfkd.networks.batchnorm import LayerMoments
from raydfkd.networks.observed import Need, Observation, ObservedNetwork
from raydfkd.networks.small import SmallResNet

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


def test_moments_of_images_pool_to_those_of_each_class(teacher):
    observed, images = ObservedNetwork(teacher, taps=MOMENTS, frozen=True), toy_images(6)
    by_image, by_class = observed(images, groups=6), observed(images, groups=2)
    for found, expected in zip(by_image.moments, by_class.moments, strict=True):
        torch.testing.assert_close(found.pooled(2).mean, expected.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.pooled(2).var, expected.var, rtol=1e-4, atol=1e-6)


def test_pooling_one_group_changes_nothing():
    one = LayerMoments(
        mean=torch.randn(1, 3), var=torch.rand(1, 3), running_mean=torch.zeros(3), running_var=torch.ones(3)
    )
    assert one.pooled() is one


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_variance_keeps_its_digits_beside_a_mean_ten_times_the_deviation(layout):
    x = 10 + torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=layout)
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(768, 2)).eval()
    (found,) = ObservedNetwork(network, taps=MOMENTS, frozen=True)(x).moments
    var, _ = var_mean(x.double())
    torch.testing.assert_close(found.var[0].double(), var, rtol=1e-4, atol=0)


def test_variance_of_a_constant_input_is_not_negative():
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 2)).eval()
    (found,) = ObservedNetwork(network, taps=MOMENTS, frozen=True)(torch.full((5, 1, 8, 8), 3.7)).moments
    assert 0 <= found.var.item() < 1e-4


@pytest.mark.parametrize(
    "taps", [frozenset(), MOMENTS, frozenset({Need.FEATURES}), frozenset(Need) - {Need.ATTENTION}], ids=len
)
def test_observing_does_not_change_the_answer(teacher, taps):
    images = toy_images(6)
    seen = ObservedNetwork(teacher, taps=taps, frozen=True)(images, groups=2)
    torch.testing.assert_close(seen.logits, teacher(images), rtol=1e-4, atol=1e-5)


def objective_of(observed, images, groups):
    """Cross-entropy, distance of the means and of the variances, and the gradient of their sum for the images."""
    seen = observed(images, groups=groups)
    parts = torch.stack(
        [
            nn.functional.cross_entropy(seen.logits, torch.arange(len(images)) % CLASSES),
            sum((layer.mean - layer.running_mean).square().sum() for layer in seen.moments),
            sum((layer.var - layer.running_var).abs().sum() for layer in seen.moments),
        ]
    )
    return parts.detach(), *torch.autograd.grad(parts.sum(), images)


class InFloat64:
    """The plain network with every moment taken directly: what all fast paths are compared with."""

    def __init__(self, network):
        self._network = copy.deepcopy(network).double()

    def __call__(self, images, *, groups):
        logits, caught = batchnorm_inputs(self._network, images)
        moments = []
        for layer, x in caught:
            pairs = [var_mean(part) for part in x.chunk(groups)]
            var, mean = (torch.stack(values) for values in zip(*pairs, strict=True))
            moments.append(
                LayerMoments(mean=mean, var=var, running_mean=layer.running_mean, running_var=layer.running_var)
            )
        return Observation(logits=logits, moments=tuple(moments))


def assert_close_to_float64(teacher, observed, groups, *, parts_within, gradient_within):
    images = toy_images(6)
    parts, gradient = objective_of(observed, images, groups)
    expected_parts, expected = objective_of(InFloat64(teacher), images.detach().double().requires_grad_(), groups)
    torch.testing.assert_close(parts.double(), expected_parts, rtol=parts_within, atol=0)
    assert (gradient - expected).norm() / expected.norm() < gradient_within


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("precision", "parts_within", "gradient_within"), [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 0.02, 0.1)]
)
def test_objective_and_gradient_are_those_of_the_plain_network_in_float64(
    teacher, groups, precision, parts_within, gradient_within
):
    observed = ObservedNetwork(teacher, taps=MOMENTS, frozen=True, precision=precision)
    assert_close_to_float64(teacher, observed, groups, parts_within=parts_within, gradient_within=gradient_within)


def network_with(norm):
    torch.manual_seed(0)
    return trained(nn.Sequential(nn.Conv2d(1, 5, 3), norm, nn.Flatten(), nn.Linear(180, CLASSES)))


def warnings_of(caplog):
    return [record.message for record in caplog.records if record.name.startswith("raydfkd.")]


@pytest.mark.cluster
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_compiled_network_has_the_objective_and_gradient_of_the_plain_one_in_float64(caplog):
    teacher = network_with(nn.BatchNorm2d(5))
    observed = ObservedNetwork(teacher, taps=frozenset({Need.MOMENTS, Need.FEATURES}), frozen=True, compiled=True)
    assert_close_to_float64(teacher, observed, 2, parts_within=1e-5, gradient_within=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    with torch.no_grad():
        seen = observed(toy_images(6))
    torch.testing.assert_close(seen.logits, teacher(toy_images(6)), rtol=1e-4, atol=1e-5)
    assert not warnings_of(caplog)


class Branching(nn.Module):
    """Decides by the values of its input, which no single graph can."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, CLASSES)

    def forward(self, images):
        return self.head(images.flatten(1)) if images.sum() > 0 else self.head(-images.flatten(1))


def test_network_that_cannot_be_compiled_goes_on_without_and_says_so_once(caplog):
    network, images = Branching(), toy_images(6)
    observed = ObservedNetwork(network, frozen=True, compiled=True)
    for _ in range(3):
        torch.testing.assert_close(observed(images).logits, network(images))
    (line,) = warnings_of(caplog)
    assert line.startswith("the teacher cannot be compiled (")
    assert line.endswith("); going on without")


def test_network_of_more_shapes_than_are_compiled_goes_on_without(monkeypatch, caplog):
    def refuse(network, **_):
        def call(images):
            raise torch._dynamo.exc.FailOnRecompileLimitHit("recompile_limit reached")

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    network, images = batchnorm_teacher(), toy_images(6)
    observed = ObservedNetwork(network, frozen=True, compiled=True)
    torch.testing.assert_close(observed(images).logits, network(images))
    assert warnings_of(caplog) == ["the teacher cannot be compiled (recompile_limit reached); going on without"]


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


@pytest.mark.parametrize("network", [PlainNet(), nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False))])
def test_teacher_without_stored_moments_cannot_be_asked_for_them(network):
    with pytest.raises(RecipeError) as error:
        ObservedNetwork(network, taps={Need.MOMENTS: "the term x"}, frozen=True)
    assert str(error.value) == (
        "the term x needs BatchNorm layers with stored statistics, but the teacher has none; drop it, or "
        "name a folder of about 100 real pictures in synthesis.statistics"
    )


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


class NormThenRelu(nn.BatchNorm2d):
    """BatchNorm with an activation of its own, as timm has it."""

    def __init__(self, channels):
        super().__init__(channels)
        self.activation = nn.ReLU()

    def forward(self, x):
        return self.activation(super().forward(x))


def test_activation_inside_a_batchnorm_layer_stays():
    network, images = network_with(NormThenRelu(5)), toy_images(6)
    seen = ObservedNetwork(network, taps=MOMENTS, frozen=True)(images)
    torch.testing.assert_close(seen.logits, network(images), rtol=1e-4, atol=1e-5)
    assert len(seen.moments) == 1
