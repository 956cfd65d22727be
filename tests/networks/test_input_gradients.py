from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from raydfkd.networks.input_gradients import (
    Convolution,
    FastInputGradients,
    by_columns,
    by_spreading,
    by_subpixels,
    choose,
)

STEMS = [  # outputs, kernel, stride, padding, size
    (5, (7, 7), (2, 2), (3, 3), (21, 22)),
    (5, (3, 3), (1, 1), (1, 1), (8, 8)),
    (5, (3, 3), (2, 2), (0, 0), (12, 11)),
    (4, (3, 5), (1, 1), (1, 0), (9, 8)),
    (4, (4, 4), (4, 4), (0, 0), (18, 17)),
    (4, (2, 3), (3, 3), (1, 2), (18, 17)),
    (4, (1, 1), (2, 2), (0, 0), (7, 7)),
]
DEPTHWISE = [  # kernel, stride, padding, dilation, size
    ((3, 3), (2, 2), (1, 1), (1, 1), (12, 11)),
    ((5, 5), (2, 2), (0, 0), (1, 1), (17, 18)),
    ((3, 5), (3, 2), (2, 4), (1, 1), (17, 18)),
    ((3, 3), (2, 1), (2, 1), (2, 1), (17, 18)),
]


def assert_input_gradient(way, convolution, channels, size):
    x = torch.randn(2, channels, *size, dtype=torch.float64, requires_grad=True)
    y = convolution(x)
    gy = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, gy)
    torch.testing.assert_close(way(convolution, gy, size), expected)


@pytest.mark.parametrize("way", [by_columns, by_subpixels])
@pytest.mark.parametrize(("outputs", "kernel", "stride", "padding", "size"), STEMS)
def test_input_gradient_of_a_stem_is_that_of_the_library(way, outputs, kernel, stride, padding, size):
    torch.manual_seed(0)
    weight = torch.randn(outputs, 3, *kernel, dtype=torch.float64)
    stem = Convolution(weight=weight, bias=None, stride=stride, padding=padding, dilation=(1, 1), groups=1)
    assert_input_gradient(way, stem, 3, size)


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "size"), DEPTHWISE)
def test_input_gradient_of_a_strided_depthwise_convolution_is_that_of_the_library(
    kernel, stride, padding, dilation, size
):
    torch.manual_seed(0)
    weight = torch.randn(6, 1, *kernel, dtype=torch.float64)
    depthwise = Convolution(weight=weight, bias=None, stride=stride, padding=padding, dilation=dilation, groups=6)
    assert_input_gradient(by_spreading, depthwise, 6, size)


@pytest.mark.parametrize(
    ("channels", "outputs", "groups", "stride", "in_float32", "in_bfloat16"),
    [
        (3, 8, 1, 2, by_columns, by_subpixels),
        (8, 8, 8, 2, None, by_spreading),
        (8, 8, 8, 1, None, None),
        (8, 16, 8, 2, None, None),
        (8, 8, 2, 2, None, None),
        (8, 8, 1, 2, None, None),
    ],
)
def test_each_kind_of_convolution_takes_its_own_way(channels, outputs, groups, stride, in_float32, in_bfloat16):
    layer = nn.Conv2d(channels, outputs, 3, stride=stride, groups=groups)
    convolution = Convolution(
        weight=layer.weight, bias=None, stride=(stride, stride), padding=(0, 0), dilation=(1, 1), groups=groups
    )
    assert choose(convolution, torch.float32) is in_float32
    assert choose(convolution, torch.bfloat16) is in_bfloat16


class Padding(nn.Conv2d):
    """Pads for itself, as timm's convolutions with TensorFlow's padding do."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, groups=self.groups)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 6, 7, stride=2, padding=3),
        nn.Conv2d(3, 6, 3, stride=1, padding="same", padding_mode="reflect", bias=False),
        nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6),
        Padding(6, 6, 3, stride=2, groups=6),
        Padding(1, 6, 3, stride=2),
    ],
    ids=lambda layer: f"{type(layer).__name__}-{layer.extra_repr()}",
)
def test_frozen_layer_answers_and_differentiates_as_it_does_in_float64(layer, dtype, tolerance):
    torch.manual_seed(0)
    layer.requires_grad_(False)
    images = torch.randn(4, layer.in_channels, 12, 12)
    exact = images.double().requires_grad_()
    expected_y = layer.double()(exact)
    gy = torch.randn_like(expected_y)
    (expected,) = torch.autograd.grad(expected_y, exact, gy)
    images.requires_grad_()
    layer.float()
    with FastInputGradients(), torch.autocast("cpu", torch.bfloat16, dtype == torch.bfloat16):
        y = layer(images)
    (found,) = torch.autograd.grad(y, images, gy.to(y.dtype))
    assert y.dtype == dtype
    assert found.dtype == torch.float32
    assert (y - expected_y).norm() / expected_y.norm() < tolerance
    assert (found - expected).norm() / expected.norm() < tolerance


def test_layer_that_learns_gets_the_gradient_of_its_weights():
    layer = nn.Conv2d(3, 4, 3)
    with FastInputGradients():
        layer(torch.randn(2, 3, 8, 8, requires_grad=True)).sum().backward()
    assert layer.weight.grad is not None


def test_bias_that_depends_on_the_images_keeps_its_gradient():
    torch.manual_seed(0)
    stem, images = nn.Conv2d(3, 4, 3).requires_grad_(False), torch.randn(2, 3, 8, 8, requires_grad=True)

    def answer(x):
        return F.conv2d(x, stem.weight, x.mean((0, 2, 3)).sum() + stem.bias).square().sum()

    (expected,) = torch.autograd.grad(answer(images), images)
    with FastInputGradients():
        value = answer(images)
    torch.testing.assert_close(torch.autograd.grad(value, images)[0], expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    "layer", [nn.Conv2d(3, 4, 3), nn.Conv2d(3, 3, 3, stride=2, groups=3)], ids=["stem", "strided depthwise"]
)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_convolution_that_is_computed_again_in_the_backward_pass_has_its_gradient(layer, use_reentrant, precision):
    layer.requires_grad_(False)
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    with FastInputGradients(), torch.autocast("cpu", torch.bfloat16, precision == torch.bfloat16):
        value = checkpoint(lambda x: layer(x).square(), images, use_reentrant=use_reentrant).sum()
    (expected,) = torch.autograd.grad(layer(images).square().sum(), images)
    (found,) = torch.autograd.grad(value, images) if not use_reentrant else (_backward(value, images),)
    assert (found - expected).norm() / expected.norm() < (1e-5 if precision == torch.float32 else 0.05)


def _backward(value, images):
    value.backward()
    return images.grad


def test_weights_are_cast_only_for_a_convolution_that_goes_its_own_way():
    layer, images = nn.Conv2d(8, 8, 3).requires_grad_(False), torch.randn(2, 8, 8, 8, requires_grad=True)
    with torch.profiler.profile() as profile, FastInputGradients(), torch.autocast("cpu", torch.bfloat16):
        layer(images), layer(images)
    casts = [event.count for event in profile.key_averages() if event.key == "aten::_to_copy"]
    assert sum(casts) <= 5, "once a call of weight and bias, and once of the images, which autocast keeps"
