"""Small networks of other families: what they take, hold and refuse."""

from __future__ import annotations

import pytest
import torch
from test_networks import build, refusal
from torch import nn

from raydfkd.networks.batchnorm import layers_with_statistics
from raydfkd.networks.build import count_parameters
from raydfkd.networks.families import MLP, PlainCNN, SmallViT

ANY_SIZE = {"vgg_small": {"widths": [4, 6, 8]}, "mobilenet_small": {"width": 4}}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ANY_SIZE)
def test_network_takes_images_of_any_small_size(name, channels):
    for size in (28, 32, 64):
        network = build(name, channels=channels, classes=7, size=size, **ANY_SIZE[name])
        assert network(torch.rand(3, channels, size, size)).shape == (3, 7)


def test_vgg_takes_images_that_are_smaller_than_its_poolings():
    assert build("vgg_small", size=5, widths=[4, 6, 8])(torch.rand(2, 1, 5, 5)).shape == (2, 10)


def test_plain_network_is_the_tutorials():
    network = PlainCNN(10, 1, size=28)
    assert count_parameters(network) == (9 * 32 + 32) + (9 * 32 * 64 + 64) + (64 * 144 * 128 + 128) + (128 * 10 + 10)
    assert network(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    assert not layers_with_statistics(network)
    assert len(layers_with_statistics(PlainCNN(10, 1, norm=True))) == 2


@pytest.mark.parametrize(
    ("pools", "size", "kernel", "flat"),
    [(1, 28, 3, 144), (2, 28, 3, 25), (2, (16, 24), 3, 8), (1, (8, 12), 3, 8), (2, 28, 5, 16), (2, (16, 24), 5, 3)],
)
def test_plain_network_pools_once_or_twice(pools, size, kernel, flat):
    network = PlainCNN(10, 1, size=size, widths=(4, 6, 8), pools=pools, kernel=kernel)
    assert network(torch.rand(2, 1, *((size, size) if isinstance(size, int) else size))).shape == (2, 10)
    (first, _) = (layer for layer in network.modules() if isinstance(layer, nn.Linear))
    assert first.in_features == 6 * flat
    assert sum(isinstance(layer, nn.MaxPool2d) for layer in network.modules()) == pools


def test_linear_layers_take_images_of_one_size():
    network = MLP(10, 3, size=8, widths=(16, 12))
    assert count_parameters(network) == (3 * 64 * 16 + 16) + (16 * 12 + 12) + (12 * 10 + 10)
    assert network(torch.rand(2, 3, 8, 8)).shape == (2, 10)
    assert not layers_with_statistics(network)
    assert len(layers_with_statistics(MLP(10, 3, size=8, widths=(16, 12), norm=True))) == 2


def test_depthwise_layers_have_a_filter_for_each_channel():
    layers = [layer for layer in build("mobilenet_small", width=4).modules() if isinstance(layer, nn.Conv2d)]
    grouped = [layer for layer in layers if layer.groups > 1]
    assert len(grouped) == 6
    assert all(layer.weight.shape[1] == 1 for layer in grouped)


def test_transformer_sees_patches_with_their_places():
    torch.manual_seed(0)
    network = SmallViT(5, 1, size=16, patch=4, width=16, depth=2).eval()
    images = torch.rand(2, 1, 16, 16)
    assert network(images).shape == (2, 5)
    assert network.places.shape == (1, 16, 16)
    turned = images.flip(2)
    assert not torch.allclose(network(images), network(turned), atol=1e-4)
    nn.init.zeros_(network.places)
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4)
    swapped = patches.flip(2).permute(0, 1, 2, 4, 3, 5).reshape(2, 1, 16, 16)
    assert torch.allclose(network(images), network(swapped), atol=1e-4), "without places the order of patches is lost"


def test_patches_must_divide_the_image():
    with pytest.raises(ValueError, match="^size is 28 and patch 5, which does not divide it$"):
        SmallViT(5, 1, size=28, patch=5)


def test_residual_network_with_groupnorm_stores_no_statistics():
    network = build("resnet_small", depth=8, width=4, norm="group")
    assert not layers_with_statistics(network)
    norms = [layer for layer in network.modules() if isinstance(layer, nn.GroupNorm)]
    assert {layer.num_groups for layer in norms} == {4, 8}
    assert count_parameters(network) == count_parameters(build("resnet_small", depth=8, width=4))
    assert refusal(build, "resnet_small", norm="layer").startswith('teacher.options.norm is "layer"')
