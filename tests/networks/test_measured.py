"""Moments that pictures have inside networks of any kind."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer
from torchvision.models.convnext import LayerNorm2d
from toy import CLASSES, batchnorm_teacher, toy_images

from raydfkd.errors import RecipeError
from raydfkd.networks.observed import Need, ObservedNetwork

MOMENTS = {Need.MOMENTS: "the term"}


def measuring(network, taps=MOMENTS, **options):
    return ObservedNetwork(network, taps=taps, frozen=True, statistics="measured", image_shape=(1, 8, 8), **options)


class Around(nn.Module):
    """``inner`` between a convolution and a head; ``turn`` puts channels where it wants them, and back."""

    def __init__(self, inner, turn=lambda x: x, back=lambda x: x):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(1, 6, 3, padding=1)
            self.inner = inner
            self.head = nn.Linear(6, CLASSES)
        self.turn, self.back = turn, back

    def maps(self, images):
        return self.conv(images)

    def forward(self, images):
        return self.head(self.back(self.inner(self.turn(self.maps(images)))).relu().mean((2, 3)))


def to_tokens(x):
    return x.flatten(2).mT


def from_tokens(x):
    return x.mT.unflatten(2, (8, 8))


def channels_last(x):
    return x.permute(0, 2, 3, 1)


def channels_second(x):
    return x.permute(0, 3, 1, 2)


class OwnRMSNorm(nn.Module):
    """Called as norm layers are, and none of torch's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


NORMS = {
    "tokens": Around(nn.LayerNorm(6), to_tokens, from_tokens),
    "tokens, root mean square": Around(nn.RMSNorm(6), to_tokens, from_tokens),
    "tokens, a class of somebody's": Around(OwnRMSNorm(), to_tokens, from_tokens),
    "maps, channels last": Around(nn.LayerNorm(6), channels_last, channels_second),
    "maps, channels second": Around(LayerNorm2d(6)),
    "whole maps": Around(nn.LayerNorm((6, 8, 8))),
    "groups": Around(nn.GroupNorm(2, 6)),
    "images": Around(nn.InstanceNorm2d(6, affine=True, track_running_stats=True)),
    "batches without statistics": Around(nn.BatchNorm2d(6, track_running_stats=False)),
}


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind", NORMS)
def test_input_of_a_norm_layer_of_any_kind_has_its_moments_with_their_gradient(kind, groups):
    network, images = NORMS[kind].eval(), toy_images(6)
    seen = measuring(network)(images, groups=groups)
    (found,) = seen.moments
    assert found.layer == "inner"
    torch.testing.assert_close(seen.logits, network(images))
    maps = network.maps(images).unflatten(0, (groups, -1))
    var, mean = torch.var_mean(maps, (1, 3, 4), correction=0)
    torch.testing.assert_close((found.mean, found.var), (mean, var), rtol=1e-4, atol=1e-5)
    parts = torch.randn(2, groups, 6, generator=torch.Generator().manual_seed(1))
    (expected,) = torch.autograd.grad((parts[0] * mean).sum() + (parts[1] * var).sum(), images)
    (gradient,) = torch.autograd.grad((parts[0] * found.mean).sum() + (parts[1] * found.var).sum(), images)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


class WithoutNorms(nn.Module):
    """Two convolutions and two linear layers; ReLUs work in place."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Conv2d(1, 4, 3)
            self.second = nn.Conv2d(4, 6, 3)
            self.hidden = nn.Linear(96, 5)
            self.head = nn.Linear(5, CLASSES)

    def outputs(self, images):
        first = self.first(images)
        second = self.second(first.relu())
        hidden = self.hidden(second.relu().flatten(1))
        return [first, second, hidden]

    def forward(self, images):
        maps = F.relu_(self.second(F.relu_(self.first(images))))
        return self.head(F.relu_(self.hidden(maps.flatten(1))))


def test_without_norm_layers_outputs_of_convolutions_and_hidden_linear_layers_count():
    network, images = WithoutNorms().eval(), toy_images(6)
    seen = measuring(network)(images)
    assert [one.layer for one in seen.moments] == ["first", "second", "hidden"]
    torch.testing.assert_close(seen.logits, network(images))
    expected, found = [], []
    for output, one in zip(network.outputs(images), seen.moments, strict=True):
        var, mean = torch.var_mean(output, [dim for dim in range(output.ndim) if dim != 1], correction=0)
        torch.testing.assert_close((one.mean[0], one.var[0]), (mean, var), rtol=1e-4, atol=1e-5)
        expected.append(mean.sum() + var.square().sum())
        found.append(one.mean.sum() + one.var.square().sum())
    gradients = [
        torch.autograd.grad(sum(values) + logits.square().sum(), images)[0]
        for values, logits in ((found, seen.logits), (expected, network(images)))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_where_there_is_a_norm_layer_nothing_else_counts():
    seen = measuring(nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Conv2d(3, 2, 3), WithHead(32)))
    assert [one.layer for one in seen(toy_images(4)).moments] == ["1"]


class WithHead(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.head = nn.Linear(features, CLASSES)

    def forward(self, x):
        return self.head(x.flatten(1))


def test_layers_of_batchnorm_count_beside_those_of_other_kinds_in_the_order_of_the_forward_pass():
    norms = (nn.GroupNorm(1, 3), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.LayerNorm((2, 4, 4)))
    seen = measuring(nn.Sequential(nn.Conv2d(1, 3, 3), *norms, WithHead(32)))(toy_images(4))
    assert [one.layer for one in seen.moments] == ["1", "3", "4"]


@pytest.mark.parametrize("network", [batchnorm_teacher(), WithoutNorms(), NORMS["tokens"]], ids=["bn", "none", "ln"])
@pytest.mark.parametrize("split", [6, 4, 1])
def test_moments_are_compared_with_those_of_all_pictures_together(network, split):
    observed, pictures = measuring(network), toy_images(6, seed=1).detach()
    observed.measure(pictures.split(split))
    for one in observed(pictures.requires_grad_()).moments:
        torch.testing.assert_close((one.mean[0], one.var[0]), (one.running_mean, one.running_var), rtol=1e-4, atol=1e-5)
    known = [(one.running_mean, one.running_var) for one in observed(pictures).moments]
    others = observed(toy_images(4)).moments
    assert all(not torch.allclose(one.mean[0], mean) for one, (mean, _) in zip(others, known, strict=True))
    for one, (mean, var) in zip(others, known, strict=True):
        assert torch.equal(one.running_mean, mean)
        assert torch.equal(one.running_var, var)


def test_stored_statistics_count_unless_they_are_to_be_measured():
    network, images = batchnorm_teacher(), toy_images(6)
    (first, _) = ObservedNetwork(network, taps=MOMENTS, frozen=True)(images).moments
    assert torch.equal(first.running_mean, network.body[0][1].running_mean)


def test_blocks_of_a_vision_transformer_have_moments_of_each_class():
    network = VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=CLASSES
    )
    nn.init.normal_(network.heads.head.weight)
    options = {"taps": {Need.CLASS_MOMENTS: "the term"}, "frozen": True, "statistics": "measured"}
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = ObservedNetwork(network, **options)(images, groups=3)
    names = [f"encoder.layers.encoder_layer_{block}.ln_{norm}" for block in (0, 1) for norm in (1, 2)]
    assert [one.layer for one in seen.moments] == [*names, "encoder.ln"]
    assert [one.mean.shape for one in seen.moments] == [(3, 8)] * 5
    alone = ObservedNetwork(network, **options)(images[2:4])
    for one, two in zip(alone.moments, seen.moments, strict=True):
        torch.testing.assert_close(one.mean[0], two.mean[1], rtol=1e-4, atol=1e-5)


def test_network_without_a_layer_that_could_be_watched_is_refused():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, CLASSES))

        def forward(self, images):
            return images.flatten(1) @ self.weight

    said = "the term needs norm layers, convolutions or hidden linear layers, but the teacher has none that can be seen"
    with pytest.raises(RecipeError, match=said):
        measuring(Bare())


def test_network_whose_layers_are_beside_its_answer_is_refused():
    network = WithHead(64)
    network.side = nn.LayerNorm(5)
    with pytest.raises(RecipeError, match="needs the moments of layers, but none is met on the way to the answer"):
        measuring(network)


def test_images_that_meet_other_layers_than_the_pictures_did_are_refused():
    class Gated(Around):
        def forward(self, images):
            return super().forward(images if images.mean() > 5 else self.inner(images.expand(-1, 6, -1, -1))[:, :1])

    observed = measuring(Gated(nn.GroupNorm(2, 6)))
    observed.measure([toy_images(4)])
    with pytest.raises(RecipeError, match="these images take another way through the teacher's layers than the"):
        observed(toy_images(4) + 10)


@pytest.mark.parametrize("network", [WithoutNorms(), NORMS["tokens"]], ids=["none", "ln"])
def test_in_bfloat16_moments_are_close(network):
    images = toy_images(6)
    half = measuring(network, precision=torch.bfloat16)(images)
    full = measuring(network)(images)
    for one, other in zip(half.moments, full.moments, strict=True):
        torch.testing.assert_close(one.mean, other.mean, rtol=0.05, atol=0.02)
        torch.testing.assert_close(one.var, other.var, rtol=0.05, atol=0.02)
    sum(one.mean.sum() + one.var.sum() for one in half.moments).backward()
    assert images.grad.isfinite().all()
    assert images.grad.any()


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
@pytest.mark.cluster  # most of a minute for the compiler; test_observed compiles in every run of the tests
def test_compiled_network_has_the_measured_moments_and_gradients_of_the_plain_one(caplog):
    network, found = nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), WithHead(108)), []
    for compiled in (False, True):
        observed, images = measuring(network, compiled=compiled), toy_images(6)
        observed.measure([toy_images(4, seed=1)])
        (one,) = observed(images).moments
        (one.mean - one.running_mean).square().sum().add(one.var.log().sum()).backward()
        found.append((one.mean.detach(), one.running_mean, images.grad))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert not [record for record in caplog.records if "cannot be compiled" in record.message]
