from __future__ import annotations

import pytest
import torch

from raydfkd.config.schema import PluginSpec
from raydfkd.errors import RecipeError
from raydfkd.images.augment import AUGMENTATIONS, build_augmentations
from raydfkd.images.views import refuse_unnameable, views_of
from raydfkd.seeds import rng_from

AUGMENT = [PluginSpec(kind="affine", degrees=20.0, shift=0.2), PluginSpec(kind="flip")]


def test_view_of_an_image_follows_from_its_seed_whoever_shares_its_batch():
    augment = build_augmentations(AUGMENT, where="test")
    images, seeds = torch.rand(4, 1, 8, 8, generator=rng_from(0)), torch.tensor([7, 9, 7, 2**62])
    found = views_of(images, seeds, augment)
    order = torch.tensor([2, 0, 3])
    torch.testing.assert_close(views_of(images[order], seeds[order], augment), found[order], rtol=0, atol=0)
    torch.testing.assert_close(found[1], augment(images[1:2], rng_from(9))[0], rtol=0, atol=0)
    same = views_of(images[:1].repeat(2, 1, 1, 1), torch.tensor([3, 4]), augment)
    assert not torch.equal(same[0], same[1])


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ([], "distill.augment is empty, so all views of an image are alike, but views needs several; add one"),
        (
            [PluginSpec(kind="flip"), PluginSpec(kind="mixup")],
            "distill.augment[1]: mixup mixes images, but views needs",
        ),
        ([PluginSpec(kind="curriculum")], "distill.augment[0]: curriculum changes over the steps, but views sees"),
    ],
)
def test_views_that_do_not_follow_from_a_seed_are_refused(monkeypatch, augment, message):
    def curriculum():
        return lambda images, rng, progress: images

    monkeypatch.setitem(AUGMENTATIONS._factories, "curriculum", curriculum)

    with pytest.raises(RecipeError) as error:
        refuse_unnameable(augment, where="distill.augment", who="views")
    assert str(error.value).startswith(message)
