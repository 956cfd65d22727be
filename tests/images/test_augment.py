from __future__ import annotations

import torch

from raydfkd.images.augment import Affine
from raydfkd.seeds import rng_from


def turned(height, width):
    """A disc of 10 pixels across in the middle of white, turned by up to half a turn."""
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    disc = ((x**2 + y**2).sqrt() - 5).clamp(0, 1).expand(8, 1, -1, -1)
    return disc, Affine(degrees=180)(disc, rng_from(3))


def test_disc_that_is_turned_stays_a_disc_in_images_of_any_shape():
    for height, width in ((24, 24), (24, 48), (48, 24)):
        disc, seen = turned(height, width)
        torch.testing.assert_close(seen, disc, atol=0.3, rtol=0)
