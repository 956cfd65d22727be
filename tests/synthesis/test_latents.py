"""What generators are given for an image."""

from __future__ import annotations

import math

import pytest
import torch

from raydfkd.seeds import rng_from
from raydfkd.synthesis.latents import DrawnLatents, NoisyLayers, TrainedLatents

CPU = torch.device("cpu")


def make(kind, seeds=(1, 2), count=3, codes=None):
    return kind([rng_from(seed) for seed in seeds], count=count, latent=5, codes=codes, device=CPU)


def test_drawn_latents_are_others_at_each_step_and_trained_ones_until_they_are_renewed():
    drawn, trained = make(DrawnLatents), make(TrainedLatents)
    trained.renew()
    assert not torch.equal(drawn(), drawn())
    first = trained().clone()
    assert torch.equal(first, trained())
    trained.renew()
    assert not torch.equal(first, trained())
    assert drawn.trained == ()
    assert [tensor.requires_grad for tensor in trained.trained] == [True]


def test_each_generator_draws_from_its_own_source_whoever_is_beside_it():
    together, alone = make(DrawnLatents, seeds=(1, 2))(), make(DrawnLatents, seeds=(2,))()
    assert together.shape == (2, 3, 5)
    assert torch.equal(together[1], alone[0])


def test_codes_stand_beside_the_numbers_and_count_in_the_width():
    codes = torch.eye(3)
    latents = make(DrawnLatents, seeds=(1,), codes=codes)
    assert latents.width == 8
    assert torch.equal(latents()[0, :, 5:], codes)


def noisy(codes, seed=0):
    layers = NoisyLayers(rng_from(seed), codes=codes.repeat_interleave(4, 0), classes=len(codes), latent=6, device=CPU)
    layers.renew()
    return layers


def test_latents_of_a_noisy_layer_are_the_standardised_embeddings_through_it():
    codes = torch.randn(3, 7, generator=rng_from(1))
    layers = noisy(codes)
    [weights] = layers.trained
    standard = (codes - codes.mean(0)) / codes.std(0, correction=0)
    found = layers()
    assert found.shape == (1, 12, 6)
    for label in range(3):
        for image in range(4):
            torch.testing.assert_close(found[0, 4 * label + image], standard[label] @ weights[image])
    large = NoisyLayers(rng_from(2), codes=torch.randn(40, 256), classes=40, latent=64, device=CPU)
    large.renew()
    assert large().std().item() == pytest.approx(1, abs=0.1), "of unit variance, as drawn latents are"


def test_images_of_one_layer_are_related_as_the_embeddings_of_their_classes_are():
    codes = torch.randn(3, 256, generator=rng_from(1))
    codes[1] = codes[0] + 0.1 * torch.randn(256, generator=rng_from(2))
    layers = NoisyLayers(rng_from(0), codes=codes, classes=3, latent=512, device=CPU)
    layers.renew()
    first, near, far = layers()[0]
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(first, near, 0) > 0.6
    assert cosine(first, far, 0) < 0.1


def test_one_hot_codes_through_noisy_layers_are_latents_of_each_image_by_itself():
    latents = noisy(torch.eye(3))()[0]
    products = latents @ latents.T / 6
    away = products[~torch.eye(12, dtype=torch.bool)].abs()
    assert away.mean() < math.sqrt(1 / 6)


def test_renewed_layers_are_others():
    layers = noisy(torch.randn(3, 7))
    first = layers().clone()
    layers.renew()
    assert not torch.equal(first, layers())
