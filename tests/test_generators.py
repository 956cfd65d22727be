from __future__ import annotations

import pytest
import torch
from toy import SPACE, shipped

from raydfkd.generators import GENERATORS, ConvGenerator, StackedGenerators
from raydfkd.registry import RecipeError

FORMS = ["loop", "vmap"]


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


def test_loop_and_vmap_make_the_same_images_with_the_same_gradients(generators):
    images, gradients = images_and_gradients(generators, "loop")
    vmap_images, vmap_gradients = images_and_gradients(generators, "vmap")
    torch.testing.assert_close(vmap_images, images, rtol=1e-5, atol=1e-6)
    for found, expected in zip(vmap_gradients, gradients, strict=True):
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


def test_batchnorm_of_the_generator_has_ordinary_eps():
    """The released code of DAFL passes 0.8 as eps, where momentum was meant."""
    norms = [module for module in ConvGenerator(SPACE).modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {1e-5}


def test_image_size_that_doublings_cannot_reach_is_refused():
    with pytest.raises(RecipeError, match="doublings is 4, but image size 8 is not divisible by 16"):
        GENERATORS.build("conv", {"doublings": 4}, SPACE, where="test")


@pytest.mark.parametrize("doublings", [0, 1, 3])
def test_every_number_of_doublings_reaches_the_image_size(doublings):
    generator = GENERATORS.build("conv", {"doublings": doublings, "latent": 3, "width": 8}, SPACE, where="test")
    assert generator(torch.randn(2, 3)).shape == (2, 1, 8, 8)
