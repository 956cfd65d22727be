"""Drawn images that say whether a student's agreement carries to images that were not made for it."""

from __future__ import annotations

import torch
from torch import nn

from raydfkd.config.schema import ImageSpace
from raydfkd.runner import probe
from raydfkd.runner.probe import drawn_probe

SPACE = ImageSpace(channels=3, size=16, mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2))


class Brightness(nn.Module):
    """Sees the second class in what is brighter than a bound, which little is."""

    def __init__(self, bound=2.0):
        super().__init__()
        self.bound = nn.Parameter(torch.tensor(bound))

    def forward(self, images):
        over = 10 * (images.mean((1, 2, 3)) - self.bound)
        return torch.stack([-over, over], 1)


def answers(images, network=None):
    return (network or Brightness())((images.float() / 255 - 0.4) / 0.2).argmax(1)


def test_probe_follows_from_the_seed_and_has_all_classes():
    found = drawn_probe(Brightness(), SPACE, seed=0)
    assert found.shape == (probe.IMAGES, 3, 16, 16)
    assert found.dtype == torch.uint8
    assert torch.equal(found, drawn_probe(Brightness(), SPACE, seed=0))
    assert not torch.equal(found, drawn_probe(Brightness(), SPACE, seed=1))
    rare = answers(found).float().mean().item()
    flat = torch.nn.functional.one_hot(torch.zeros(probe.CANDIDATES, dtype=torch.long), 2).float()

    class Sure(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, images):
            return flat[: len(images)]

    unchosen = answers(drawn_probe(Sure(), SPACE, seed=0)).float().mean().item()
    assert 0 < unchosen < 0.25, "the class is rare in what is drawn"
    assert rare > 1.5 * unchosen


def test_large_images_are_drawn_small_and_enlarged(monkeypatch):
    monkeypatch.setattr(probe, "MOST_PIXELS", 18)
    space = ImageSpace(channels=1, size=(72, 96), mean=(0.5,), std=(0.5,))
    found = drawn_probe(Brightness(), space, seed=0)
    assert found.shape == (probe.IMAGES, 1, 72, 96)
    steps = (found[:, :, 1:].float() - found[:, :, :-1].float()).abs().mean()
    small = drawn_probe(Brightness(), ImageSpace(channels=1, size=(18, 24), mean=(0.5,), std=(0.5,)), seed=0)
    assert steps < 0.7 * (small[:, :, 1:].float() - small[:, :, :-1].float()).abs().mean()
