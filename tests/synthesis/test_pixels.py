from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from toy import CLASSES, SmallMemory, assert_same_rows, batches_of, batchnorm_teacher, joined, toy_recipe, unit_of

from raydfkd.errors import RecipeError
from raydfkd.images.augment import AUGMENTATIONS
from raydfkd.networks.optimizers import warmup_cosine
from raydfkd.seeds import rng_from
from raydfkd.synthesis.build import build_synthesizer
from raydfkd.synthesis.student_feed import LiveStudentFeed

CPU = torch.device("cpu")

WHITE = 0.5 / 0.225
"""In nominal units, as minus black."""
LEVEL = 1 / 255 / 0.225
"""One level of a stored pixel, in nominal units."""


def noise_of(unit):
    """What the optimisation of each class starts from, [N, 1, 8, 8]."""
    request = unit.request
    shape = (request.images_per_class, 1, 8, 8)
    return torch.cat([torch.randn(shape, generator=rng_from(seed)) for seed in request.class_seeds])


def nominal(batch):
    """Stored pixels in nominal units."""
    return (batch.images.float() / 255 - 0.5) / 0.225


def moves_of_squares(batch, unit):
    """How far the pixels of each 2x2 square were moved, [N, 1, 4, 4, 4], 0 in all squares that touch black or white."""
    moved = nominal(batch) - noise_of(unit)
    squares, pixels = (x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4) for x in (moved, batch.images))
    return squares * ((pixels > 0) & (pixels < 255)).all(4, keepdim=True)


@pytest.mark.parametrize(
    ("images_per_class", "batch_size", "sizes"),
    [(3, 6, [6]), (5, 4, [4, 4, 2]), (4, 1, [2, 2, 2, 2]), (1, 100, [2]), (6, 10, [6, 6]), (7, 6, [6, 4, 4])],
)
def test_every_class_gets_exactly_its_images_in_batches_of_the_recipe_s_size(
    tmp_path, images_per_class, batch_size, sizes
):
    recipe = toy_recipe(tmp_path, [f"synthesis.batch_size={batch_size}"])
    batches = batches_of(recipe, unit_of((3, 1), images_per_class))
    assert [len(batch) for batch in batches] == sizes
    assert joined(batches).labels.bincount(minlength=CLASSES).tolist() == [0, images_per_class, 0, images_per_class]
    for batch in batches:
        assert batch.labels.tolist() == [3] * (len(batch) // 2) + [1] * (len(batch) // 2)


def test_the_teacher_comes_to_see_the_classes_that_were_asked_for(tmp_path):
    settings = ["synthesis.objective=[cross_entropy]", "synthesis.stages=[{steps: 60}]", "synthesis.augment=[]"]
    recipe = toy_recipe(tmp_path, [*settings, "synthesis.batch_size=100"])
    unit = unit_of(tuple(range(CLASSES)), 5)
    made = joined(batches_of(recipe, unit))
    with torch.no_grad():
        before = F.cross_entropy(batchnorm_teacher()(noise_of(unit)), made.labels)
    after = F.cross_entropy(made.teacher_logits.float(), made.labels)
    assert made.teacher_logits.argmax(1).tolist() == made.labels.tolist()
    assert after < 0.2 * before


def test_first_step_of_adam_moves_each_pixel_by_the_learning_rate_against_its_gradient(tmp_path):
    """The kept image is the last iterate: here the start would have had the lower objective."""
    settings = ["synthesis.objective=[image_l2]", "synthesis.stages=[{steps: 1}]", "synthesis.augment=[]"]
    recipe = toy_recipe(tmp_path, [*settings, "synthesis.warmup=0", "synthesis.lr=3.0"])
    unit = unit_of((0,), 4)
    noise = noise_of(unit)
    expected = (noise - 3 * noise.sign()).clamp(-WHITE, WHITE)
    made = nominal(joined(batches_of(recipe, unit)))
    torch.testing.assert_close(made, expected, rtol=0, atol=0.51 * LEVEL)
    assert made.norm() > noise.norm()


@pytest.mark.parametrize(
    ("mean", "std"),
    [(0.0, 1.0), (0.0, 1 / 255), (0.5, 0.5), (0.485, 0.229), (0.9, 0.01)],
    ids=["0..1", "0..255", "-1..1", "ImageNet's", "bright"],
)
def test_teachers_that_differ_in_what_they_take_are_inverted_alike(tmp_path, mean, std):
    """All of them are the toy teacher behind a layer that turns the units they take into its own."""

    class Rescaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher = batchnorm_teacher()

        def forward(self, images):
            return self.teacher((images * std + mean - 0.4) / 0.3)

    objective = (
        "synthesis.objective=[cross_entropy, {term: bn_moments, form: kl}, {term: total_variation, weight: 0.1}, "
        "{term: image_l2, weight: 0.1}]"
    )
    settings = [objective, "synthesis.augment=[{kind: noise, std: 0.3}, flip]", "synthesis.batch_size=8"]
    expected = joined(batches_of(toy_recipe(tmp_path, settings), unit_of((0, 1), 4)))
    space = [f"teacher.image_space.mean=[{mean}]", f"teacher.image_space.std=[{std}]"]
    synthesizer = build_synthesizer(toy_recipe(tmp_path, [*settings, *space]), Rescaled().eval(), torch.device("cpu"))
    made = joined(list(synthesizer.produce(unit_of((0, 1), 4).request, lambda _: None)))
    difference = (made.images.int() - expected.images.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


def test_optimisation_begins_around_mid_grey_with_hardly_a_pixel_beyond_black_or_white(tmp_path):
    settings = ["synthesis.stages=[{steps: 1}]", "synthesis.lr=1e-9", "synthesis.batch_size=200"]
    made = joined(batches_of(toy_recipe(tmp_path, settings), unit_of((0, 1), 100))).images.float()
    assert made.mean() == pytest.approx(127.5, abs=1)
    assert made.std() == pytest.approx(0.225 * 255, rel=0.03)
    assert ((made == 0) | (made == 255)).float().mean() < 0.04


def test_warmup_shortens_the_first_step(tmp_path):
    settings = ["synthesis.objective=[image_l2]", "synthesis.stages=[{steps: 1}]", "synthesis.augment=[]"]
    recipe = toy_recipe(tmp_path, [*settings, "synthesis.warmup=5", "synthesis.lr=2.0"])
    unit = unit_of((0,), 4)
    noise = noise_of(unit)
    expected = (noise - 0.4 * noise.sign()).clamp(-WHITE, WHITE)
    torch.testing.assert_close(nominal(joined(batches_of(recipe, unit))), expected, rtol=0, atol=0.51 * LEVEL)


def test_learning_rate_warms_up_and_then_falls_to_zero_as_half_a_cosine():
    factors = [warmup_cosine(step, steps=10, warmup=4) for step in range(11)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[7] == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert factors[10] == pytest.approx(0)


def test_stage_that_pools_moves_all_pixels_of_a_square_alike(tmp_path):
    settings = ["synthesis.stages=[{pool: 2, steps: 4}]", "synthesis.clip=false", "synthesis.objective=[cross_entropy]"]
    recipe = toy_recipe(tmp_path, [*settings, "synthesis.augment=[]"])
    unit = unit_of((0, 1), 2)
    squares = moves_of_squares(joined(batches_of(recipe, unit)), unit)
    assert (squares.amax(4) - squares.amin(4)).max() <= 1.01 * LEVEL
    means = squares.mean(4).flatten()
    assert means.max() - means.min() > 5 * LEVEL


def test_stage_without_pooling_moves_pixels_of_a_square_apart(tmp_path):
    settings = ["synthesis.stages=[{pool: 2, steps: 4}, {steps: 4}]", "synthesis.clip=false"]
    recipe = toy_recipe(tmp_path, [*settings, "synthesis.objective=[cross_entropy]", "synthesis.augment=[]"])
    unit = unit_of((0, 1), 2)
    squares = moves_of_squares(joined(batches_of(recipe, unit)), unit)
    assert (squares.amax(4) - squares.amin(4)).max() > 5 * LEVEL


def test_pooling_that_does_not_divide_the_image_is_refused(tmp_path):
    recipe = toy_recipe(tmp_path, ["synthesis.stages=[{pool: 3, steps: 4}]"])
    with pytest.raises(RecipeError, match="pool is 3, which does not divide image size 8; use 2"):
        batches_of(recipe)


def test_stage_of_a_size_shows_the_teacher_images_scaled_to_it_and_keeps_all_pixels(monkeypatch, tmp_path):
    sizes = []

    class Noted:
        def __call__(self, images, rng):
            sizes.append(tuple(images.shape[2:]))
            return images

    monkeypatch.setitem(AUGMENTATIONS._factories, "noted", Noted)
    stages = "[{size: 5, steps: 1}, {size: [6, 8], steps: 1}, {size: 8, steps: 1}]"
    recipe = toy_recipe(tmp_path, [f"synthesis.stages={stages}", "synthesis.augment=[noted]"])
    assert joined(batches_of(recipe, unit_of((0, 1), 1))).images.shape == (2, 1, 8, 8)
    assert sizes == [(5, 5), (6, 8), (8, 8)]
    with pytest.raises(RecipeError, match="size is given, but pool is 2 as well; drop either"):
        batches_of(toy_recipe(tmp_path, ["synthesis.stages=[{size: 5, pool: 2, steps: 1}]"]))


class OneSize(torch.nn.Module):
    """Takes 8x8 images only and says so as torchvision's transformers do."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        torch._assert(images.shape[-1] == 8, f"Wrong image height! Expected 8 but got {images.shape[-1]}!")
        return self.network(images)


def test_pooling_that_the_teacher_cannot_take_is_refused_whatever_it_raises(tmp_path):
    with pytest.raises(RecipeError) as error:
        build_synthesizer(toy_recipe(tmp_path), OneSize(batchnorm_teacher()), CPU)
    assert str(error.value) == (
        "synthesis: stages: pool is 2, but the teacher cannot take 4x4 pixels (Wrong image height! Expected 8 but got "
        "4!); use pool 1"
    )


def test_pooling_that_the_student_cannot_take_is_refused_where_a_term_asks_it(tmp_path):
    student = LiveStudentFeed(OneSize(batchnorm_teacher(seed=1)), batchnorm="running")
    build_synthesizer(toy_recipe(tmp_path), batchnorm_teacher(), CPU, student)
    recipe = toy_recipe(tmp_path, ["synthesis.objective=[cross_entropy, competition]"])
    with pytest.raises(RecipeError, match="pool is 2, but the student cannot take 4x4 pixels .*; use pool 1"):
        build_synthesizer(recipe, batchnorm_teacher(), CPU, student)


def test_stage_can_have_augmentations_of_its_own(monkeypatch, tmp_path):
    seen = []

    class Noted:
        def __init__(self, *, label: str) -> None:
            self._label = label

        def __call__(self, images, rng):
            seen.append((self._label, images.shape[-1]))
            return images

    monkeypatch.setitem(AUGMENTATIONS._factories, "noted", Noted)
    stages = "[{pool: 2, steps: 2, augment: [{kind: noted, label: own}]}, {steps: 1}, {steps: 1, augment: []}]"
    recipe = toy_recipe(tmp_path, [f"synthesis.stages={stages}", "synthesis.augment=[{kind: noted, label: common}]"])
    batches_of(recipe, unit_of((0, 1), 2))
    assert seen == [("own", 4), ("own", 4), ("common", 8)]


def test_mistake_in_the_augmentation_of_a_stage_is_named_with_its_place(tmp_path):
    recipe = toy_recipe(tmp_path, ["synthesis.stages=[{steps: 1}, {steps: 1, augment: [{kind: jitter, pixel: 1}]}]"])
    with pytest.raises(
        RecipeError, match=r"synthesis.stages\[1\].augment\[0\].pixel: unknown key; did you mean pixels"
    ):
        batches_of(recipe)


@pytest.mark.parametrize(("clip", "stays_inside"), [("true", True), ("false", False)])
def test_clip_keeps_what_the_teacher_sees_between_black_and_white(tmp_path, clip, stays_inside):
    largest = math.sqrt(64) * WHITE
    logged = []
    settings = ["synthesis.lr=5.0", f"synthesis.clip={clip}", "synthesis.stages=[{steps: 6}]", "synthesis.warmup=1"]
    objective = "synthesis.objective=[cross_entropy, {term: image_l2, weight: 0.0}]"
    batches_of(toy_recipe(tmp_path, [*settings, objective]), unit_of((0, 1), 2), logged.append)
    assert (logged[-1]["image_l2"] <= largest) is stays_inside


def test_the_log_holds_the_first_and_last_step_of_each_stage_with_unweighted_parts(tmp_path):
    logged = []
    settings = ["synthesis.stages=[{pool: 2, steps: 3}, {steps: 4}]", "synthesis.batch_size=100"]
    objective = "synthesis.objective=[{term: cross_entropy, weight: 2.0}, {term: image_l2, weight: 0.5}]"
    batches_of(toy_recipe(tmp_path, [*settings, objective]), unit_of((0, 1), 2), logged.append)
    assert [entry["step"] for entry in logged] == [1, 3, 7]
    for entry in logged:
        assert entry["total"] == pytest.approx(2 * entry["cross_entropy"] + 0.5 * entry["image_l2"], rel=1e-5)


def test_objective_falls_over_a_stage(tmp_path):
    logged = []
    recipe = toy_recipe(tmp_path, ["synthesis.stages=[{steps: 40}]", "synthesis.augment=[]"])
    batches_of(recipe, unit_of((0, 1), 2), logged.append)
    assert logged[-1]["total"] < 0.5 * logged[0]["total"]


def test_two_batches_of_a_class_differ(tmp_path):
    first, second = batches_of(toy_recipe(tmp_path), unit_of((0, 1), 4))
    assert not torch.equal(first.images, second.images)


def test_images_of_a_class_in_one_batch_differ(tmp_path):
    (made,) = batches_of(toy_recipe(tmp_path, ["synthesis.batch_size=8"]), unit_of((0, 1), 4))
    assert len({image.numpy().tobytes() for image in made.images}) == 8


def test_bfloat16_makes_other_images_and_the_same_ones_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr("raydfkd.devices.has_bfloat16", lambda _: True)
    unit = unit_of((0, 1), 2)
    recipe = toy_recipe(tmp_path, ["synthesis.precision=bfloat16"])
    one, again = joined(batches_of(recipe, unit)), joined(batches_of(recipe, unit))
    assert_same_rows(one, again)
    assert not torch.equal(one.images, joined(batches_of(toy_recipe(tmp_path), unit)).images)


def made_with_room_for(room, error, recipe, unit):
    synthesizer = build_synthesizer(recipe, SmallMemory(room, error), torch.device("cpu"))
    return list(synthesizer.produce(unit.request, lambda _: None))


@pytest.mark.parametrize(("room", "sizes"), [(12, [10, 10]), (7, [6, 4, 6, 4]), (3, [2] * 10), (1, [1] * 20)])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_batch_that_does_not_fit_into_memory_is_halved_and_every_image_is_made(tmp_path, caplog, room, sizes, error):
    recipe = toy_recipe(tmp_path, ["synthesis.batch_size=12", "synthesis.objective=[cross_entropy]"])
    batches = made_with_room_for(room, error, recipe, unit_of((3, 1), 10))
    assert [len(batch) for batch in batches] == sizes
    assert joined(batches).labels.bincount(minlength=CLASSES).tolist() == [0, 10, 0, 10]
    lines = [record.message for record in caplog.records]
    assert len(lines) == len(set(lines))
    assert ("no memory for a batch of 10 images; going on with half as many" in lines) is (room < 10)


def test_halves_are_those_that_a_smaller_batch_would_have_started_from(tmp_path):
    settings = ["synthesis.objective=[image_l2]", "synthesis.stages=[{steps: 3}]"]
    unit = unit_of((3, 1), 4)
    halved = made_with_room_for(
        4, MemoryError(), toy_recipe(tmp_path / "large", [*settings, "synthesis.batch_size=8"]), unit
    )
    noise = noise_of(unit).unflatten(0, (2, 4))
    for index, batch in enumerate(halved):
        began = noise[:, 2 * index : 2 * index + 2].flatten(0, 1)
        assert (nominal(batch) - began).abs().max() < 1


def test_image_that_does_not_fit_by_itself_and_other_errors_are_not_swallowed(tmp_path):
    recipe = toy_recipe(tmp_path, ["synthesis.objective=[cross_entropy]"])
    with pytest.raises(torch.OutOfMemoryError):
        made_with_room_for(0, torch.OutOfMemoryError(), recipe, unit_of((0, 1), 2))
    with pytest.raises(RuntimeError, match="something else"):
        made_with_room_for(0, RuntimeError("something else"), recipe, unit_of((0, 1), 2))
