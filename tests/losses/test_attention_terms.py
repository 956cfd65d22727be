from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from scipy.stats import gaussian_kde
from toy import attention_teacher, toy_images

from raydfkd.errors import RecipeError
from raydfkd.losses.objective import TERMS, View
from raydfkd.networks.attention import Attention
from raydfkd.networks.observed import Need, Observation, ObservedNetwork


def block(seed, *, rows=3, heads=2, tokens=7, width=5, extra=1):
    rng = torch.Generator().manual_seed(seed)
    output = torch.randn(rows, tokens, width, generator=rng)
    maps = (2 * torch.randn(rows, heads, tokens, tokens, generator=rng)).softmax(3)
    return Attention(output=output, weights=lambda: maps, patches=slice(extra, tokens))


def value_of(name, blocks, **options):
    seen = Observation(logits=torch.zeros(3, 4), attention=tuple(blocks))
    view = View(images=torch.zeros(3, 1, 2, 2), targets=None, teacher=seen, observe=lambda _: seen)
    return TERMS.build(name, options, where="test")(view).item()


def cosines(vectors):
    """Of every two of [P, D], one by one."""
    pairs = [(a, b) for a in range(len(vectors)) for b in range(a)]
    return np.array(
        [vectors[a] @ vectors[b] / np.linalg.norm(vectors[a]) / np.linalg.norm(vectors[b]) for a, b in pairs]
    )


@pytest.mark.parametrize("bandwidth", [0.02, 0.05, 0.3])
def test_patch_similarity_entropy_is_that_of_the_kernel_density_of_all_pairs_without_the_class_token(bandwidth):
    blocks = [block(0), block(1, tokens=6, extra=0)]
    entropies = []
    for one in blocks:
        for tokens in one.output[:, one.patches].numpy():
            found = cosines(tokens)
            density = gaussian_kde(found, bw_method=bandwidth / found.std(ddof=1))
            at = np.linspace(-2.5, 2.5, 20_001)
            entropies.append(trapezoid(-density(at) * np.log(density(at) + 1e-300), at))
    expected = -np.mean(np.reshape(entropies, (2, 3)).mean(1))
    assert value_of("patch_similarity_entropy", blocks, bandwidth=bandwidth) == pytest.approx(expected, abs=2e-3)


def test_patches_that_are_all_alike_have_the_entropy_of_one_kernel():
    alike = Attention(output=torch.ones(2, 5, 4), weights=lambda: torch.zeros(0), patches=slice(0, 5))
    expected = 0.5 * math.log(2 * math.pi * math.e * 0.05**2)
    assert value_of("patch_similarity_entropy", [alike]) == pytest.approx(-expected, abs=1e-4)


def test_pair_of_patches_anywhere_has_a_gradient():
    output = block(2).output.requires_grad_()
    seen = Observation(
        logits=torch.zeros(3, 4), attention=(Attention(output=output, weights=lambda: output, patches=slice(1, 7)),)
    )
    view = View(images=torch.zeros(3, 1, 2, 2), targets=None, teacher=seen, observe=lambda _: seen)
    (gradient,) = torch.autograd.grad(TERMS.build("patch_similarity_entropy", {}, where="test")(view), output)
    assert (gradient[:, 1:].norm(dim=2) > 1e-6).all()
    assert not gradient[:, 0].any()


def ssim(x, y):
    """Of two maps in [0, 1], over one window."""
    covariance = np.mean((x - x.mean()) * (y - y.mean()))
    luminance = (2 * x.mean() * y.mean() + 1e-4) / (x.mean() ** 2 + y.mean() ** 2 + 1e-4)
    return luminance * (2 * covariance + 9e-4) / (x.var() + y.var() + 9e-4)


def test_head_similarity_is_one_minus_the_mean_ssim_of_distinct_heads_patch_by_patch():
    blocks = [block(0, heads=3), block(1, heads=2, tokens=6, extra=0)]
    of_blocks = []
    for one in blocks:
        maps = one.maps[..., one.patches, one.patches].numpy()
        maps = maps - maps.min(3, keepdims=True)
        maps = maps / maps.max(3, keepdims=True)
        pairs = [
            ssim(image[a, patch], image[b, patch])
            for image in maps
            for a in range(len(image))
            for b in range(a)
            for patch in range(image.shape[1])
        ]
        of_blocks.append(np.mean(pairs))
    assert value_of("head_similarity", blocks) == pytest.approx(1 - np.mean(of_blocks), abs=1e-4)


def test_heads_that_look_at_the_same_patches_differ_by_nothing():
    maps = block(0).maps[:, :1].expand(-1, 3, -1, -1)
    assert value_of("head_similarity", [Attention(output=maps, weights=lambda: maps, patches=slice(1, 7))]) < 1e-6


def test_heads_cannot_be_compared_where_each_block_has_one():
    seen = ObservedNetwork(attention_teacher(heads=1), taps={Need.ATTENTION}, frozen=True)(toy_images(3))
    with pytest.raises(RecipeError, match="head_similarity compares heads, but each block of the teacher has a single"):
        TERMS.build("head_similarity", {}, where="test").prepare(seen)


def test_blocks_with_a_single_head_say_nothing_of_how_alike_heads_are():
    assert value_of("head_similarity", [block(0), block(1, heads=1)]) == value_of("head_similarity", [block(0)])


def test_attention_entropy_is_that_of_a_gaussian_with_the_variance_of_the_rows_cosines():
    blocks = [block(0), block(1, tokens=6, extra=0)]
    entropies = []
    for one in blocks:
        rows = one.maps.numpy().mean(1)[:, one.patches, one.patches]
        variances = np.array([cosines(image).var() for image in rows])
        entropies.append(np.mean(0.5 * np.log(2 * np.pi * np.e * (variances + 1e-8))))
    assert value_of("attention_entropy", blocks) == pytest.approx(-np.mean(entropies), rel=1e-4)


@pytest.mark.parametrize("name", ["patch_similarity_entropy", "head_similarity", "attention_entropy"])
def test_images_can_be_moved_to_lower_a_term_of_attention(name):
    term = TERMS.build(name, {}, where="test")
    observed = ObservedNetwork(attention_teacher(), taps={Need.ATTENTION}, frozen=True)
    images = toy_images(2).detach().requires_grad_()
    optimizer = torch.optim.Adam([images], lr=0.05)
    values = []
    for _ in range(25):
        value = term(View(images=images, targets=None, teacher=observed(images), observe=observed))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0] - 0.05
