from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from toy import SPACE, shipped

from raydfkd.config.schema import ImageSpace
from raydfkd.errors import RecipeError
from raydfkd.networks.generators import GENERATORS, ConvGenerator, StackedGenerators, can_group

FORMS = ["loop", "vmap", "grouped"]


@pytest.fixture(params=shipped(GENERATORS))
def generators(request):
    torch.manual_seed(0)
    return [GENERATORS.build(request.param, {}, SPACE, where="test") for _ in range(3)]


def latents_for(generators, count=4):
    rng = torch.Generator().manual_seed(1)
    return torch.randn(len(generators), count, generators[0].latent, generator=rng)


def images_and_gradients(generators, form):
    stack, latents = StackedGenerators(generators, form=form), latents_for(generators).requires_grad_()
    images = stack(latents)
    weights = torch.linspace(-1, 1, images.numel()).view_as(images)
    return images, torch.autograd.grad((images * weights).sum(), [latents, *stack.parameters()])


@pytest.mark.parametrize("form", [*FORMS, "auto"])
def test_stack_makes_the_images_of_its_generators_one_after_another(generators, form):
    latents = latents_for(generators)
    expected = torch.cat([generator(own) for generator, own in zip(generators, latents, strict=True)])
    torch.testing.assert_close(StackedGenerators(generators, form=form)(latents), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_stack_of_one_equals_the_generator(generators, form):
    latents = latents_for(generators[:1])
    made = StackedGenerators(generators[:1], form=form)(latents)
    torch.testing.assert_close(made, generators[0](latents[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["vmap", "grouped"])
def test_generators_run_together_make_the_images_and_gradients_of_the_loop(generators, form):
    images, gradients = images_and_gradients(generators, "loop")
    found_images, found_gradients = images_and_gradients(generators, form)
    torch.testing.assert_close(found_images, images, rtol=1e-5, atol=1e-6)
    for found, expected in zip(found_gradients, gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_a_stack_is_that_of_its_generators(generators, form):
    stack, latents = StackedGenerators(generators, form=form), latents_for(generators)
    stack(latents).square().sum().backward()
    stacked = [parameter.grad for parameter in stack.parameters()]
    for index, generator in enumerate(generators):
        generator(latents[index]).square().sum().backward()
        for found, parameter in zip(stacked, generator.parameters(), strict=True):
            torch.testing.assert_close(found[index], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_generator_of_a_stack_knows_nothing_of_its_neighbours(generators, form):
    stack, latents = StackedGenerators(generators, form=form), latents_for(generators)
    stack(latents).unflatten(0, (3, -1))[1].sum().backward()
    for parameter in stack.parameters():
        assert parameter.grad[0].abs().max() == 0
        assert parameter.grad[2].abs().max() == 0


def test_stack_trains_its_own_weights_and_not_those_of_the_generators(generators):
    before = [parameter.detach().clone() for parameter in generators[0].parameters()]
    stack = StackedGenerators(generators)
    assert sum(parameter.numel() for parameter in stack.parameters()) == 3 * sum(one.numel() for one in before)
    optimizer = torch.optim.Adam(stack.parameters(), lr=0.1)
    stack(latents_for(generators)).sum().backward()
    optimizer.step()
    for parameter, expected in zip(generators[0].parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=0)
        assert parameter.grad is None


class Reversed(nn.Sequential):
    """Sequential layers in an order of its own."""

    def forward(self, latents):
        for layer in reversed(self):
            latents = layer(latents)
        return latents


def upscaler(*layers, dim=1):
    return nn.Sequential(nn.Linear(5, 12), nn.Unflatten(dim, (3, 2, 2)), *layers)


def test_stack_of_sequential_layers_of_every_known_kind_can_be_grouped():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, stride=2, dilation=2, padding=3), nn.BatchNorm2d(6, track_running_stats=False)]
    layers += [nn.ReLU(), nn.Upsample(scale_factor=3), nn.BatchNorm2d(6, affine=False, track_running_stats=False)]
    layers += [nn.LeakyReLU(0.1), nn.Conv2d(6, 1, 1, bias=False), nn.Tanh(), nn.Sigmoid()]
    generators = [copy.deepcopy(upscaler(*layers)) for _ in range(3)]
    for generator in generators:
        for parameter in generator.parameters():
            nn.init.normal_(parameter)
    latents = torch.randn(3, 4, 5)
    expected = torch.cat([generator(own) for generator, own in zip(generators, latents, strict=True)])
    torch.testing.assert_close(StackedGenerators(generators, form="grouped")(latents), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "generator",
    [
        upscaler(nn.Conv2d(3, 3, 1, groups=3)),
        upscaler(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")),
        upscaler(nn.Conv2d(3, 3, 3, padding="same")),
        upscaler(nn.GroupNorm(1, 3)),
        upscaler(nn.Softmax(1)),
        upscaler(dim=-1),
        nn.Sequential(nn.Unflatten(1, (5, 1, 1)), nn.Conv2d(5, 3, 1)),
        Reversed(nn.Linear(1, 2), nn.Unflatten(1, (5, 1, 1)), nn.Sigmoid()),
    ],
)
def test_stack_that_cannot_be_grouped_is_looped_by_auto_and_refused_by_grouped(generator):
    assert not can_group(generator)
    with pytest.raises(ValueError, match="form is 'grouped', but this generator has layers that cannot be"):
        StackedGenerators([generator], form="grouped")
    latents = torch.randn(1, 4, 5)
    torch.testing.assert_close(StackedGenerators([generator])(latents), generator(latents[0]))


def test_images_of_the_architectures_of_luo_et_al_2020_have_its_channels():
    space = ImageSpace(channels=3, size=224, mean=(0.5,) * 3, std=(0.25,) * 3)
    options = {"latent": 8, "width": 128, "doublings": 4, "taper": "harmonic"}
    with torch.device("meta"):
        generator = GENERATORS.build("conv", options, space, where="test")
        assert generator(torch.empty(2, 8)).shape == (2, 3, 224, 224)
    convolutions = [layer for layer in generator if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [128, 64, 42, 32, 3]


def test_batchnorm_of_the_generator_has_ordinary_eps():
    """The released code of DAFL epochs 0.8 as eps, where momentum was meant."""
    norms = [module for module in ConvGenerator(SPACE).modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {1e-5}


def test_image_size_that_doublings_cannot_reach_is_refused():
    with pytest.raises(RecipeError, match="doublings is 4, but image size 8 is not divisible by 16; use at most 3"):
        GENERATORS.build("conv", {"doublings": 4}, SPACE, where="test")


@pytest.mark.parametrize("doublings", [0, 1, 3])
def test_every_number_of_doublings_reaches_the_image_size(doublings):
    generator = GENERATORS.build("conv", {"doublings": doublings, "latent": 3, "width": 8}, SPACE, where="test")
    assert generator(torch.randn(2, 3)).shape == (2, 1, 8, 8)
