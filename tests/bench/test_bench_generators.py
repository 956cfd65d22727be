"""The benchmark compares the same work; how fast it is, is not a test."""

from __future__ import annotations

import json

import pytest
import torch

from raydfkd.bench import generators
from raydfkd.bench.generators import (
    CASES,
    GeneratorCase,
    bench_generators,
    build_generators,
    one_by_one_step,
    stacked_step,
)
from raydfkd.networks.generators import can_group

TINY = GeneratorCase(size=8, options={"latent": 4, "width": 8}, cpu=((3, 2),), cuda=((3, 2),))


@pytest.mark.parametrize("form", ["auto", "loop", "vmap", "grouped"])
def test_stacked_training_makes_the_images_of_training_one_by_one(form):
    made, latents = build_generators(TINY, 3), torch.randn(3, 2, 4)
    stacked = stacked_step(made, latents, form)
    single = one_by_one_step(made, latents)
    for _ in range(3):
        torch.testing.assert_close(stacked(), single(), rtol=1e-4, atol=1e-5)


def test_training_changes_the_images():
    made, latents = build_generators(TINY, 2), torch.randn(2, 2, 4)
    step = stacked_step(made, latents)
    assert not torch.allclose(step(), step(), atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_every_measured_architecture_makes_images_of_its_size_and_can_be_grouped(name):
    with torch.device("meta"):
        (generator,) = build_generators(CASES[name], 1)
        images = generator(torch.empty(2, generator.latent))
    assert images.shape == (2, 3, CASES[name].size, CASES[name].size)
    assert can_group(generator)


def test_rows_of_the_generators_benchmark_name_the_pack(monkeypatch):
    monkeypatch.setattr(generators, "CASES", {"tiny": TINY})
    (row,) = [json.loads(row.to_json()) for row in bench_generators(rounds=1, device="cpu")]
    assert row.keys() == {"case", "device", "steps_per_s", "ratio_fair", "ratio_fair_range", "note"}
    assert row["case"] == "generators tiny, 3 x 2"
    assert row["steps_per_s"] > 0
