from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from toy import SYNTHESIZERS_UNDER_TEST, batches_of, batchnorm_teacher, toy_recipe

from raydfkd.errors import RecipeError
from raydfkd.images.augment import AUGMENTATIONS, Affine, Chain, Mixture
from raydfkd.images.pixels import BLACK
from raydfkd.losses.outputs import CrossEntropy
from raydfkd.runner.check import check
from raydfkd.seeds import rng_from
from raydfkd.synthesis.build import build_synthesizer

TAUGHT = ["real_data=digits", "teacher.classes=10", "teacher.train={epochs: 1, augment: [mixup]}"]
MIXED = {
    "own criterion": (
        ["distill.augment=[flip, mixup]", "distill.criterion=test_augment:ReadsNumbers"],
        "distill.augment[1]",
        "the criterion test_augment:ReadsNumbers",
    ),
    "moments by class": (
        ["synthesis.augment=[mixup]", "synthesis.objective=[one_hot, {term: bn_moments, scope: class}]"],
        "synthesis.augment[0]",
        "the term bn_moments",
    ),
    "labels of a stage": (
        [
            "synthesis.stages=[{steps: 2, augment: [mixup]}]",
            "synthesis.objective=[one_hot, {term: bn_moments, scope: class}]",
        ],
        "synthesis.stages[0].augment[0]",
        "the term bn_moments",
    ),
    "teacher": ([*TAUGHT, "teacher.weights=not_there.pt"], "teacher.train.augment[0]", "the teacher's training"),
}


class ReadsNumbers:
    """A criterion of the user's that takes labels to be numbers."""

    needs_labels = True

    def __call__(self, student, teacher, labels):
        return student.logits.gather(1, labels[:, None]).mean()


@pytest.mark.parametrize("case", MIXED)
def test_images_are_not_mixed_where_something_reads_the_label_of_each(tmp_path, case):
    settings, where, reader = MIXED[case]
    with pytest.raises(RecipeError) as error:
        check(toy_recipe(tmp_path, settings))
    assert str(error.value) == (
        f"{where}: mixup mixes images, but {reader} takes each to be of one class; drop one of them"
    )


@pytest.mark.parametrize("synthesizer", SYNTHESIZERS_UNDER_TEST)
def test_images_can_be_mixed_where_nothing_reads_a_label(tmp_path, synthesizer):
    settings = ["synthesis.augment=[mixup]", "synthesis.objective=[one_hot, bn_moments]", "distill.augment=[mixup]"]
    recipe = toy_recipe(tmp_path, settings, synthesizer=synthesizer)
    check(recipe)
    assert batches_of(recipe)


def test_images_without_targets_cannot_be_of_some_classes_only(tmp_path):
    settings = ["synthesis.targets=none", "synthesis.objective=[one_hot]", "transfer_set.classes=[1, 3]"]
    recipe = toy_recipe(tmp_path, settings, synthesizer="generator")
    with pytest.raises(
        RecipeError, match="transfer_set.classes names 2 of the teacher's 4 classes, but with synthesis.targets none"
    ):
        build_synthesizer(recipe, batchnorm_teacher(), torch.device("cpu"))


def turned(height, width):
    """A disc of 10 pixels across in the middle of white, turned by up to half a turn."""
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    disc = ((x**2 + y**2).sqrt() - 5).clamp(0, 1).expand(8, 1, -1, -1)
    return disc, Affine(degrees=180)(disc, rng_from(3))


def test_disc_that_is_turned_stays_a_disc_in_images_of_any_shape():
    for height, width in ((24, 24), (24, 48), (48, 24)):
        disc, seen = turned(height, width)
        torch.testing.assert_close(seen, disc, atol=0.3, rtol=0)


def colours(count=6, size=8):
    return torch.randn(count, 3, size, size, generator=rng_from(0))


def one_of(name, **options):
    return AUGMENTATIONS.build(name, options, where="test")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixing_augmentation_tells_partner_and_share_of_what_it_did(name, seed):
    """The images are constant in colour, so the mean of a mixed one tells its shares."""
    images = torch.arange(6.0).view(-1, 1, 1, 1).expand(-1, 1, 8, 16)
    mixed, mixture = one_of(name).mix(images, rng_from(seed))
    own, other = torch.arange(6.0), mixture.partner.float()
    torch.testing.assert_close(mixed.mean((1, 2, 3)), mixture.share * own + (1 - mixture.share) * other)
    torch.testing.assert_close(one_of(name)(images, rng_from(seed)), mixed, rtol=0, atol=0)
    assert sorted(mixture.partner.tolist()) == list(range(6))


def test_cutmix_replaces_a_rectangle_by_the_partner_s_of_the_same_place():
    images = colours(size=16)
    mixed, mixture = one_of("cutmix").mix(images, rng_from(1))
    for number, partner in enumerate(mixture.partner.tolist()):
        taken = (mixed[number] != images[number]).any(0)
        rows, columns = taken.any(1), taken.any(0)
        assert torch.equal(taken, rows[:, None] & columns) or partner == number
        torch.testing.assert_close(mixed[number][:, taken], images[partner][:, taken])
    assert len(set(mixture.share.tolist())) > 3, "each image has a rectangle of its own"


def test_labels_are_mixed_as_images_are_mixed_and_again_where_images_are_mixed_again():
    labels, shares = torch.tensor([2, 0, 1]), torch.eye(3)[[2, 0, 1]]
    first = Mixture(partner=torch.tensor([1, 2, 0]), share=torch.tensor([0.25, 1.0, 0.5]))
    expected = torch.tensor([[0.75, 0.0, 0.25], [1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
    torch.testing.assert_close(first.of(labels, 3), expected)
    torch.testing.assert_close(first.of(shares, 3), expected)
    second = Mixture(partner=torch.tensor([1, 0, 2]), share=torch.tensor([0.5, 0.5, 0.5]))
    torch.testing.assert_close(second.of(expected, 3)[0], 0.5 * expected[0] + 0.5 * expected[1])


def test_chain_mixes_labels_along_and_leaves_them_as_they_are_where_nothing_is_mixed():
    images, labels = colours(), torch.tensor([0, 1, 2, 0, 1, 2])
    plain = Chain([one_of("flip"), one_of("crop", pixels=2)])
    seen, same = plain.with_labels(images, labels, rng_from(1), classes=3)
    assert same is labels
    torch.testing.assert_close(seen, plain(images, rng_from(1)))

    mixing = Chain([one_of("mixup"), one_of("flip"), one_of("cutmix")])
    seen, shares = mixing.with_labels(images, labels, rng_from(1), classes=3)
    torch.testing.assert_close(seen, mixing(images, rng_from(1)))
    rng = rng_from(1)
    blended, first = one_of("mixup").mix(images, rng)
    _, second = one_of("cutmix").mix(one_of("flip")(blended, rng), rng)
    torch.testing.assert_close(shares, second.of(first.of(labels, 3), 3))
    torch.testing.assert_close(shares.sum(1), torch.ones(6))


class CannotTell:
    """Mixes images, of the user's own."""

    mixes_images = True

    def __call__(self, images, rng):
        return images.flip(0)


def test_own_augmentation_that_cannot_tell_what_it_mixed_is_refused_where_labels_are_read(tmp_path):
    own = "[test_augment:CannotTell]"
    check(toy_recipe(tmp_path, [f"distill.augment={own}"]))
    for settings, reader in (
        ([f"distill.augment={own}", "distill.criterion=hard_labels"], "the criterion hard_labels"),
        ([f"synthesis.augment={own}"], "the term cross_entropy"),
    ):
        with pytest.raises(RecipeError, match=f"without telling which, but {reader} reads their labels"):
            check(toy_recipe(tmp_path, settings))


@pytest.mark.parametrize("synthesizer", SYNTHESIZERS_UNDER_TEST)
def test_objective_gets_targets_that_are_mixed_as_the_images_are(tmp_path, synthesizer, monkeypatch):
    wanted = []
    cross_entropy = CrossEntropy.forward

    def watched(term, view):
        wanted.append(view.targets)
        return cross_entropy(term, view)

    monkeypatch.setattr(CrossEntropy, "forward", watched)
    recipe = toy_recipe(tmp_path, ["synthesis.augment=[cutmix]"], synthesizer=synthesizer)
    check(recipe)
    (kept, *_) = batches_of(recipe)
    assert all(targets.shape[1] == 4 for targets in wanted)
    shares = torch.cat(wanted)
    torch.testing.assert_close(shares.sum(1), torch.ones(len(shares)))
    assert ((shares > 0) & (shares < 1)).any()
    assert kept.labels.ndim == 1, "images are kept with the class that they were made for"


@pytest.mark.parametrize("padding", ["reflect", "border", "black"])
def test_crop_is_that_of_the_padded_image(padding):
    images, pixels = colours(), 3
    mode = {"reflect": "reflect", "border": "replicate", "black": "constant"}[padding]
    padded = F.pad(images, [pixels] * 4, mode=mode, **({"value": BLACK} if padding == "black" else {}))
    seen = one_of("crop", pixels=pixels, padding=padding)(images, rng_from(1))
    places = set()
    for image, whole in zip(seen, padded, strict=True):
        found = [(y, x) for y in range(7) for x in range(7) if torch.equal(whole[:, y : y + 8, x : x + 8], image)]
        assert found
        places.add(found[0])
    assert len(places) > 3, "each image is cropped by itself"


@pytest.mark.parametrize("size", [1, 2])
def test_crop_by_more_than_the_image_is_one_of_its_pixels(size):
    images = colours(size=size)
    seen = one_of("crop", pixels=5)(images, rng_from(1))
    assert all(
        set(one.flatten().tolist()) <= set(whole.flatten().tolist()) for one, whole in zip(seen, images, strict=True)
    )


def test_color_jitter_multiplies_light_and_stretches_about_the_mean_of_each_image():
    images = colours()
    bright = one_of("color_jitter", brightness=0.5)(images, rng_from(1))
    factors = (bright - BLACK) / (images - BLACK)
    torch.testing.assert_close(factors, factors[:, :1, :1, :1].expand_as(factors), rtol=1e-3, atol=1e-3)
    assert ((factors > 0.49) & (factors < 1.51)).all()
    assert factors.std(0).mean() > 0.05, "each image by itself"
    stretched = one_of("color_jitter", contrast=0.5)(images, rng_from(1))
    torch.testing.assert_close(stretched.mean((1, 2, 3)), images.mean((1, 2, 3)))
    ratio = stretched.std((1, 2, 3)) / images.std((1, 2, 3))
    assert ((ratio > 0.49) & (ratio < 1.51)).all()
    assert ratio.std() > 0.05


def places(height, width, count=400):
    """Images whose two channels are the x and y of each pixel's middle, from 0 to 1."""
    x, y = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)]).expand(count, -1, -1, -1).contiguous()


def rectangles(seen):
    """Left, top, width and height of what an image of ``places`` shows; exact to the border pixels."""
    height, width = seen.shape[2:]
    inner = seen[:, :, 2:-2, 2:-2]
    across = (inner[:, 0, 0, -1] - inner[:, 0, 0, 0]) * width / (width - 5)
    down = (inner[:, 1, -1, 0] - inner[:, 1, 0, 0]) * height / (height - 5)
    middle = inner.mean((2, 3))
    return middle[:, 0] - across / 2, middle[:, 1] - down / 2, across, down


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 48)])
def test_random_resized_crop_shows_rectangles_of_the_area_and_ratio_that_are_asked_for(height, width):
    seen = one_of("random_resized_crop", scale=[0.2, 0.5], ratio=[0.5, 2.0])(places(height, width), rng_from(1))
    left, top, across, down = rectangles(seen)
    area, ratio = across * down, across * width / (down * height)
    whole = (across < 0.99) & (down < 0.99)
    assert whole.float().mean() > 0.7
    assert area.max() < 0.51
    assert area[whole].min() > 0.19
    assert (area[whole].min(), area[whole].max()) == pytest.approx((0.2, 0.5), abs=0.03)
    assert (ratio[whole].min().item(), ratio[whole].max().item()) == pytest.approx((0.5, 2.0), rel=0.1)
    for start, length in ((left, across), (top, down)):
        assert (start > -0.02).all()
        assert (start + length < 1.02).all()
    assert left[whole].std() > 0.05


def test_random_resized_crop_of_a_whole_image_is_that_image():
    images = colours()
    seen = one_of("random_resized_crop", scale=[1.0, 1.0], ratio=[1.0, 1.0])(images, rng_from(1))
    torch.testing.assert_close(seen, images, rtol=1e-4, atol=1e-4)


def test_random_resized_crop_draws_one_rectangle_for_the_batch_where_that_is_wanted():
    images = places(16, 16, count=5)
    together = one_of("random_resized_crop", per_batch=True)(images, rng_from(1))
    torch.testing.assert_close(together, together[:1].expand_as(together))
    assert not torch.allclose(together, one_of("random_resized_crop", per_batch=True)(images, rng_from(2)))
    alone = one_of("random_resized_crop")(images, rng_from(1))
    assert not torch.allclose(alone, alone[:1].expand_as(alone))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.08, 0.08, 0.08, 0.08, 0.08]),
        ("linear", [1.0, 0.54, 0.08, 0.08, 0.08]),
        ("cosine", [1.0, 0.08 + 0.92 * 0.5, 0.08, 0.08, 0.08]),
        ("step", [1.0, 1.0, 0.08, 0.08, 0.08]),
    ],
)
def test_curriculum_of_crops_goes_from_whole_images_to_small_ones_by_its_milestone(schedule, expected):
    crop = one_of("random_resized_crop", schedule=schedule, milestone=0.5)
    assert [crop.least_scale(progress) for progress in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(expected)


def test_curriculum_is_told_how_far_the_steps_are():
    chain, images = Chain([one_of("random_resized_crop", schedule="cosine")]), places(16, 16, count=50)
    areas = [
        torch.stack(rectangles(chain(images, rng_from(1), progress=progress))[2:]).prod(0).mean()
        for progress in (0.0, 0.5, 1.0)
    ]
    assert areas[0] > areas[1] + 0.1 > areas[2] + 0.2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"schedule": "cosine", "milestone": 1.5}, "milestone is 1.5 of the steps, but a curriculum cannot be longer"),
        ({"scale": [0.9, 0.5]}, r"scale is \[0.9, 0.5\]; give the smaller number first"),
        ({"ratio": [2.0, 0.5]}, r"ratio is \[2, 0.5\]; give the smaller number first"),
        ({"scale": [0.0, 0.5]}, "scale.0 is 0.0"),
        ({"schedule": "linear", "scale": [0.1, 0.5]}, "scale_from is 1, which is not in scale"),
    ],
)
def test_crop_that_makes_no_sense_is_refused(options, reason):
    with pytest.raises(RecipeError, match=reason):
        one_of("random_resized_crop", **options)
