"""Synthesis with a few real pictures: as its start, and as what moments are compared with."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torchvision.models import VisionTransformer
from toy import (
    CLASSES,
    assert_same_rows,
    batches_of,
    batchnorm_teacher,
    joined,
    save_pictures,
    toy_recipe,
    unit_of,
    worker_of,
)

from raydfkd.errors import RecipeError
from raydfkd.images.pixels import nominal_from_uint8
from raydfkd.job import open_job
from raydfkd.losses.objective import Term
from raydfkd.networks.observed import ObservedNetwork
from raydfkd.runner.check import check
from raydfkd.seeds import rng_from
from raydfkd.synthesis.build import build_synthesizer
from raydfkd.synthesis.checkpoint import Interrupted
from raydfkd.synthesis.start import PictureStart

CPU = torch.device("cpu")
UNMOVED = ["synthesis.stages=[{steps: 1}]", "synthesis.lr=1e-9"]
LEVEL = 1 / 255 / 0.225
"""One level of a stored pixel, in nominal units."""


def starting(folder, *settings, noise=0.0, **options):
    """A toy recipe that starts from four pictures in ``folder``, and these."""
    images = save_pictures(folder / "pictures", 4)
    start = f"synthesis.start={{images: {folder}/pictures, noise: {noise}}}"
    return toy_recipe(folder, [start, *settings], **options), images


def same_as(pictures, images):
    """For each of ``images`` which of ``pictures`` it is, -1 for none."""
    is_same = (images[:, None] == pictures[None]).flatten(2).all(2)
    return [row.nonzero()[0].item() if row.any() else -1 for row in is_same]


# Start


def test_each_image_starts_from_a_picture_and_those_of_a_class_from_different_ones(tmp_path):
    recipe, pictures = starting(tmp_path, *UNMOVED, "synthesis.batch_size=8")
    made = joined(batches_of(recipe, unit_of((0, 2), 4)))
    assert made.labels.tolist() == [0] * 4 + [2] * 4
    found = same_as(pictures, made.images)
    assert sorted(found[:4]) == sorted(found[4:]) == [0, 1, 2, 3]
    assert found[:4] != found[4:]


def test_pictures_are_used_again_where_there_are_fewer_than_images(tmp_path):
    recipe, pictures = starting(tmp_path, *UNMOVED, "synthesis.batch_size=9")
    found = same_as(pictures, joined(batches_of(recipe, unit_of((1,), 9))).images)
    assert sorted(found[:4]) == sorted(found[4:8]) == [0, 1, 2, 3]
    assert found[8] in range(4)


def test_what_a_class_starts_from_follows_from_its_seed_alone(tmp_path):
    recipe, _ = starting(tmp_path, *UNMOVED, noise=0.5)
    alone = joined(batches_of(recipe, unit_of((2,), 2)))
    packed = joined(batches_of(recipe, unit_of((0, 2), 2)))
    assert torch.equal(packed.images[2:], alone.images)
    assert_same_rows(joined(batches_of(recipe, unit_of((2,), 2))), alone)
    assert not torch.equal(joined(batches_of(recipe, unit_of((2,), 2, seed=2))).images, alone.images)


def test_noise_is_added_in_nominal_units():
    pictures = torch.full((3, 1, 8, 8), 128, dtype=torch.uint8)
    plain = PictureStart(images=pictures, noise=0.0).draw(300, rng_from(0))
    noisy = PictureStart(images=pictures, noise=0.5).draw(300, rng_from(0))
    assert plain.unique().tolist() == pytest.approx([0.5 * LEVEL], rel=1e-4)
    assert (noisy - plain).std().item() == pytest.approx(0.5, rel=0.02)
    assert (noisy - plain).mean().item() == pytest.approx(0, abs=0.01)


class Seen(Term):
    """Keeps what the teacher is shown."""

    views: list = []  # noqa: RUF012 - the test reads it

    def forward(self, view):
        self.views.append(view.images.detach().clone())
        return view.teacher.logits.square().mean()


def test_stage_that_averages_pixels_starts_from_the_averaged_picture(tmp_path):
    settings = ["synthesis.stages=[{steps: 1, pool: 2}]", "synthesis.augment=[]", "synthesis.batch_size=4"]
    recipe, pictures = starting(tmp_path, *settings, f"synthesis.objective=['{__name__}:Seen']")
    Seen.views.clear()
    batches_of(recipe, unit_of((0,), 4))
    (shown,) = Seen.views
    averaged = (nn.functional.avg_pool2d(pictures.float(), 2) / 255 - 0.5) / 0.225
    distance = (shown[:, None] - averaged[None]).abs().flatten(2).amax(2)
    assert sorted(distance.argmin(1).tolist()) == [0, 1, 2, 3]
    assert distance.amin(1).max() < 1e-5


def likeness(images, pictures):
    """The largest correlation of each image with a picture, a mean over images."""
    one, other = (x.float().flatten(1) - x.float().flatten(1).mean(1, keepdim=True) for x in (images, pictures))
    one, other = nn.functional.normalize(one, dim=1), nn.functional.normalize(other, dim=1)
    return (one @ other.T).amax(1).mean().item()


def test_images_that_start_from_pictures_are_like_them_after_some_steps_and_those_from_noise_are_not(tmp_path):
    settings = ["synthesis.stages=[{steps: 20}]", "synthesis.batch_size=8", "synthesis.objective=[cross_entropy]"]
    recipe, pictures = starting(tmp_path / "start", *settings)
    unit = unit_of((0, 1), 4)
    made = joined(batches_of(recipe, unit))
    assert likeness(made.images, pictures) > 0.7
    assert same_as(pictures, made.images) == [-1] * 8, "they were optimised"
    noise = joined(batches_of(toy_recipe(tmp_path / "noise", settings), unit))
    assert likeness(noise.images, pictures) < 0.4


# Statistics

MATCHING = "synthesis.objective=[{{term: bn_moments, form: {form}}}]"


def tiny_vit(classes):
    """A vision transformer for grey images of 8 pixels, three times in each channel."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 1),
        VisionTransformer(
            image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=classes
        ),
    )


NETWORKS = {
    "lenet5": ["teacher.network=lenet5", "teacher.options={}", "teacher.image_space.size=32"],
    "tiny_vit": [f"teacher.network={__name__}:tiny_vit", "teacher.options={classes: 4}"],
    "convnet": [],
}


def taking_statistics(folder, *settings, **options):
    save_pictures(folder / "pictures", 9)
    return toy_recipe(folder, [f"synthesis.statistics={folder}/pictures", *settings], **options)


@pytest.mark.parametrize("form", ["norm", "squared", "kl"])
@pytest.mark.parametrize("network", NETWORKS)
def test_moments_come_closer_to_those_of_the_pictures(tmp_path, network, form):
    weights = [] if network == "convnet" else ["teacher.weights=random"]
    recipe = taking_statistics(
        tmp_path,
        *NETWORKS[network],
        *weights,
        *("teacher.train=null", "synthesis.augment=[]", "synthesis.stages=[{steps: 40}]", "synthesis.batch_size=12"),
        MATCHING.format(form=form),
    )
    told = []
    batches_of(recipe, unit_of((0, 1, 2), 4), told.append)
    assert [entry["step"] for entry in told] == [1, 40]
    assert 0 < told[1]["bn_moments"] < 0.5 * told[0]["bn_moments"]


def test_generators_of_a_teacher_without_batchnorm_match_the_pictures_class_by_class(tmp_path):
    settings = (*NETWORKS["lenet5"], "teacher.weights=random", "synthesis.steps=30", "synthesis.emissions=1")
    objective = "synthesis.objective=[{term: bn_moments, form: kl, scope: class}]"
    recipe = taking_statistics(
        tmp_path,
        *settings,
        objective,
        "synthesis.batch_per_class=4",
        "synthesis.generator.doublings=2",
        synthesizer="generator",
    )
    told = []
    made = joined(batches_of(recipe, unit_of((0, 1, 2), 4), told.append))
    assert made.labels.bincount(minlength=CLASSES).tolist() == [4, 4, 4, 0]
    assert told[-1]["bn_moments"] < told[0]["bn_moments"]


def test_another_picture_makes_other_images_and_stored_statistics_others_again(tmp_path):
    unit, made = unit_of((0, 1), 2), []
    for count in (9, 8):
        recipe = taking_statistics(tmp_path / str(count))
        (tmp_path / str(count) / f"pictures/00{count - 1}.png").unlink()
        made.append(joined(batches_of(recipe, unit)).images)
    made.append(joined(batches_of(toy_recipe(tmp_path / "stored"), unit)).images)
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(made, 2))


def test_check_takes_statistics_of_two_pictures_and_a_worker_of_all_with_the_recipe_s_threads(tmp_path, monkeypatch):
    recipe, measured = taking_statistics(tmp_path, "synthesis.threads=2"), []
    original = ObservedNetwork.measure

    def measure(self, batches):
        batches = list(batches)
        measured.append((sum(map(len, batches)), torch.get_num_threads()))
        original(self, batches)

    monkeypatch.setattr(ObservedNetwork, "measure", measure)
    check(recipe)
    worker_of(open_job(recipe))
    assert measured == [(2, 2), (9, 2)]


# Both

LIVE = ["distill.source=live", "transfer_set.images_per_class=0"]


@pytest.mark.parametrize(
    ("settings", "synthesizer", "said"),
    [
        (
            ["synthesis.start.images={folder}"],
            "generator",
            "synthesis.start.images is '{folder}', but the synthesizer generator does not begin with images; use "
            "pixels or drop start",
        ),
        (
            ["synthesis.start.images={folder}", *LIVE],
            "generator",
            "synthesis.start.images is '{folder}', but the synthesizer generator does not begin with images; use "
            "pixels or drop start",
        ),
        (
            ["synthesis.statistics={folder}", "synthesis.objective=[cross_entropy]"],
            "pixels",
            "synthesis.statistics is '{folder}', but no term of synthesis.objective compares moments; add bn_moments "
            "or drop statistics",
        ),
        (
            ["synthesis.statistics={folder}/none"],
            "pixels",
            "synthesis.statistics is '{folder}/none': no such folder; give one of pictures that every worker sees",
        ),
        (
            ["synthesis.start={{images: {folder}/none, noise: -1}}"],
            "pixels",
            "synthesis.start.noise is -1: input should be greater than or equal to 0",
        ),
        (["synthesis.start={{noise: 1}}"], "pixels", "synthesis.start.images is required and missing"),
    ],
    ids=["generator", "live", "no term", "no folder", "noise", "no key"],
)
def test_pictures_that_nothing_reads_or_that_are_not_there_are_refused_before_any_work(
    tmp_path, settings, synthesizer, said
):
    save_pictures(tmp_path / "pictures", 2)
    place = str(tmp_path / "pictures")
    with pytest.raises(RecipeError) as refused:
        check(toy_recipe(tmp_path, [one.format(folder=place) for one in settings], synthesizer=synthesizer))
    assert str(refused.value) == said.format(folder=place)
    assert not (tmp_path / "run").exists()


def test_example_of_the_documentation_is_sound(tmp_path):
    page = (Path(__file__).parents[2] / "docs/recipes.md").read_text()
    (example,) = re.findall(r"## A few real pictures\n.*?```yaml\n(.*?)```", page, flags=re.DOTALL)
    save_pictures(tmp_path / "pictures", 2)
    changes = yaml.safe_load(example.replace("~/pictures", str(tmp_path / "pictures")))["synthesis"]
    recipe = toy_recipe(tmp_path, [f"synthesis.{key}={json.dumps(value)}" for key, value in changes.items()])
    assert check(recipe).not_data_free is not None


def both(folder, *settings):
    place = folder / "pictures"
    save_pictures(place, 5)
    pictures = [f"synthesis.start={{images: {place}, noise: 0.1}}", f"synthesis.statistics={place}"]
    return toy_recipe(folder, [*pictures, *settings])


def test_broken_picture_is_a_note_and_its_absence_none(tmp_path):
    recipe = both(tmp_path)
    assert check(recipe).notes == ()
    (tmp_path / "pictures/003.png").write_bytes(b"")
    notes = check(recipe).notes
    assert [note.partition(" skipped ")[0] for note in notes] == ["synthesis.start.images:", "synthesis.statistics:"]


def test_set_is_named_by_the_pictures_contents_and_not_by_their_place(tmp_path):
    digest = open_job(both(tmp_path / "one")).digest
    assert open_job(both(tmp_path / "other")).digest == digest
    assert open_job(both(tmp_path / "one", "synthesis.start.noise=0.2")).digest != digest
    assert open_job(toy_recipe(tmp_path / "one")).digest != digest
    place = tmp_path / "other/pictures"
    (place / "000.png").write_bytes((place / "001.png").read_bytes())
    assert (
        open_job(toy_recipe(tmp_path / "one", [f"synthesis.statistics={place}"])).digest
        != open_job(toy_recipe(tmp_path / "one", [f"synthesis.statistics={tmp_path}/one/pictures"])).digest
    )


def test_worker_with_other_pictures_than_the_run_s_is_refused(tmp_path):
    recipe = both(tmp_path)
    job = open_job(recipe)
    (tmp_path / "pictures/004.png").unlink()
    with pytest.raises(RecipeError) as refused:
        worker_of(job)
    place = f"{tmp_path}/pictures"
    assert str(refused.value) == (
        f"synthesis.start.images is '{place}' or synthesis.statistics is '{place}': not the pictures that this run "
        "began with; give a folder that is the same on every machine, or use another run_dir"
    )


def test_unit_that_is_left_and_gone_on_with_by_another_worker_has_the_same_bytes(tmp_path):
    jobs = [open_job(both(tmp_path / name)) for name in ("undisturbed", "disturbed")]
    for job in jobs:
        job.transfer_set.create()
    expected = worker_of(jobs[0]).run(jobs[0].units[0])
    steps = itertools.count()
    with pytest.raises(Interrupted):
        worker_of(jobs[1], should_stop=lambda: next(steps) >= 4).run(jobs[1].units[0])
    commit = worker_of(jobs[1]).run(jobs[1].units[0])
    assert (commit.content, commit.objective) == (expected.content, expected.objective)


def test_synthesizer_of_somebody_s_may_say_that_it_starts_from_pictures(tmp_path):
    recipe, pictures = starting(tmp_path, f"synthesis.synthesizer={__name__}:Copies")
    (starts,) = build_synthesizer(recipe, batchnorm_teacher(), CPU).produce(None, None)
    assert torch.equal(starts, pictures)


class Copies:
    starts_from_pictures = True

    def __init__(self, setting, *, batch_size=1, stages=(), warmup=0):
        self._setting = setting

    def produce(self, request, log, hook=None):
        yield self._setting.start.images


# Statistics of each class


def by_class(folder, *settings, classes=CLASSES):
    """A toy recipe that compares each class with the three pictures of its own folder, and these."""
    pictures = [save_pictures(folder / "pictures" / str(label), 3, seed=label) for label in range(classes)]
    own = (
        f"synthesis.statistics={folder}/pictures",
        "synthesis.statistics_per_class=true",
        "synthesis.objective=[{term: bn_moments, form: kl, scope: class}]",
    )
    return toy_recipe(folder, [*own, *settings]), pictures


def test_moments_of_a_class_are_compared_with_those_of_its_own_pictures(tmp_path):
    recipe, pictures = by_class(tmp_path)
    judge = build_synthesizer(recipe, batchnorm_teacher(), CPU)._setting.judge
    images = nominal_from_uint8(torch.cat(pictures))
    own = torch.arange(CLASSES).repeat_interleave(3)
    same = judge(images, own, groups=CLASSES)[1].total.item()
    others = judge(images, own.roll(3), groups=CLASSES)[1].total.item()
    assert same == pytest.approx(0, abs=1e-5)
    assert others > 100 * max(same, 1e-6)


def test_statistics_of_classes_change_what_a_set_is_made_of(tmp_path):
    recipe, _ = by_class(tmp_path)
    whole = recipe.model_copy(update={"synthesis": recipe.synthesis.model_copy(update={"statistics_per_class": False})})
    assert open_job(recipe).digest != open_job(whole).digest


NOT_BY_CLASS = {
    "a class without a folder": (3, (), "0 pictures in a folder called '3' or 3"),
    "no term of classes": (4, ("synthesis.objective=[bn_moments]",), "no term compares moments of each class"),
    "no folder": (4, ("synthesis.statistics=null",), "statistics names no folder"),
}


@pytest.mark.parametrize(("classes", "settings", "message"), NOT_BY_CLASS.values(), ids=list(NOT_BY_CLASS))
def test_statistics_of_classes_that_cannot_be_taken_are_refused(tmp_path, classes, settings, message):
    with pytest.raises(RecipeError, match=message):
        check(by_class(tmp_path, *settings, classes=classes)[0])
