"""Pictures of a set: which parts are read for them, and what is shown where images are few or missing."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from toy import toy_recipe

from raydfkd.data.batches import SyntheticBatch
from raydfkd.data.transfer_set import TransferSet
from raydfkd.job import open_job
from raydfkd.runner import gallery as in_gallery
from raydfkd.runner import view as in_view
from raydfkd.runner.gallery import gallery
from raydfkd.runner.view import SetView

NAMES = ("a", "b", "c", "d")


def job_of(folder, per_class, per_unit, *settings, without=(), part_rows=4096):
    """A job whose units are there, but those of classes ``without``; two pixels tell an image's unit and row."""
    overrides = [
        f"transfer_set.images_per_class={per_class}",
        f"transfer_set.unit={{classes: 1, images_per_class: {per_unit}}}",
        f"transfer_set.part_rows={part_rows}",
        *settings,
    ]
    job = open_job(toy_recipe(folder, overrides))
    job.transfer_set.create()
    for number, unit in enumerate(job.units):
        if set(unit.request.classes) & set(without):
            continue
        count = unit.request.count
        images = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
        images[:, 0, 0, 0] = number
        images[:, 0, 0, 1] = torch.arange(count)
        sink = job.transfer_set.open(unit)
        labels = torch.tensor(unit.request.classes).repeat_interleave(unit.request.images_per_class)
        sink.write(
            SyntheticBatch(images=images, labels=labels, teacher_logits=torch.zeros(count, 4).half(), objective=1.0)
        )
        sink.commit(seconds=0.0)
    return job


@pytest.fixture
def reads(monkeypatch):
    """Counts how often each part is read."""
    counts, read = Counter(), TransferSet.read

    def counted(transfer_set, part):
        counts[part.path] += 1
        return read(transfer_set, part)

    monkeypatch.setattr(TransferSet, "read", counted)
    return counts


def shown(pictures):
    """Number of unit and row of each picture, by class."""
    return {
        name: [
            (int(image[0, 0, 0]), int(image[0, 0, 1]))
            for image, sure in zip(row, confidence, strict=True)
            if not torch.isnan(sure)
        ]
        for name, row, confidence in zip(
            pictures.class_names, pictures.images, pictures.teacher_confidence, strict=True
        )
    }


def gallery_of(job, images=12):
    return gallery(SetView(job), job.recipe.classes, NAMES, images=images)


def test_each_picture_is_of_another_unit_as_long_as_there_are_some_and_the_last_of_it_comes_first(tmp_path, reads):
    found = shown(gallery_of(job_of(tmp_path, 60, 3)))
    assert list(found) == list(NAMES)
    for number, row in enumerate(found.values()):
        assert row == [(4 * repeat + number, 2) for repeat in range(12)]
    assert set(reads.values()) == {1}
    assert reads.total() == 4 * 12, "twelve units of each class, of the twenty that there are"


def test_each_picture_says_in_which_unit_and_row_of_the_set_it_is(tmp_path):
    job = job_of(tmp_path, 16, 8, part_rows=3)
    pictures = gallery_of(job)
    seeds = {commit.unit: commit.seed for commit in job.snapshot().commits}
    for images, origins in zip(pictures.images, pictures.origins, strict=True):
        for image, origin in zip(images, origins, strict=True):
            assert origin.unit == job.units[int(image[0, 0, 0])].id
            assert (origin.index, origin.seed) == (int(image[0, 0, 1]), seeds[origin.unit])


def test_missing_class_is_left_out_and_no_part_is_read_in_search_of_it(tmp_path, reads):
    pictures = gallery_of(job_of(tmp_path, 60, 3, without=[2]))
    assert pictures.class_names == ("a", "b", "d")
    assert pictures.images.shape[:2] == (3, 12)
    assert reads.total() == 3 * 12


def test_class_with_few_images_shows_those_and_costs_the_others_none(tmp_path, reads):
    job = job_of(tmp_path, 6, 3, without=[1])
    (unit, *_) = [unit for unit in job.units if 1 in unit.request.classes]
    sink = job.transfer_set.open(unit)
    images = torch.full((1, 1, 8, 8), 77, dtype=torch.uint8)
    sink.write(
        SyntheticBatch(images=images, labels=torch.tensor([1]), teacher_logits=torch.zeros(1, 4).half(), objective=1.0)
    )
    sink.commit(seconds=0.0)
    found = shown(gallery_of(job))
    assert {name: len(row) for name, row in found.items()} == {"a": 6, "b": 1, "c": 6, "d": 6}
    assert found["b"] == [(77, 77)]
    assert set(reads.values()) == {1}
    assert reads.total() == 2 * 3 + 1


def test_later_parts_of_units_are_read_where_the_first_ones_are_not_enough_and_each_once(tmp_path, reads):
    found = shown(gallery_of(job_of(tmp_path, 16, 8, part_rows=3)))
    for number, row in enumerate(found.values()):
        assert set(row) <= {(unit, image) for unit in (number, 4 + number) for image in range(8)}
        assert len(set(row)) == 12
    assert set(reads.values()) == {1}
    assert reads.total() == 4 * 2 * 2, "the first two parts of the three have twelve images"


def test_labels_that_no_plan_foretells_are_looked_for_in_a_limited_number_of_parts(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(in_gallery, "MAX_READS", 10)
    untargeted = ["synthesis.targets=none", "synthesis.objective=[one_hot]"]
    pictures = gallery_of(job_of(tmp_path, 60, 3, *untargeted, without=[2]))
    assert pictures.class_names == ("a", "b", "d")
    assert reads.total() == 10


def test_reading_ends_with_the_first_round_that_brings_nothing_new(tmp_path, reads):
    untargeted = ["synthesis.targets=none", "synthesis.objective=[one_hot]"]
    job = job_of(tmp_path, 12, 12, *untargeted, without=[2], part_rows=6)
    pictures = gallery_of(job)
    assert {name: len(row) for name, row in shown(pictures).items()} == {"a": 12, "b": 12, "d": 12}
    assert reads.total() == 3 * 2


def test_of_many_classes_some_are_shown_and_only_their_parts_are_read(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(in_gallery, "MAX_CLASSES", 2)
    pictures = gallery_of(job_of(tmp_path, 60, 3))
    assert (pictures.class_names, pictures.of_classes) == (("a", "d"), 4)
    assert reads.total() == 2 * 12


def test_set_without_an_image_has_no_pictures(tmp_path):
    assert gallery_of(job_of(tmp_path, 3, 3, without=[0, 1, 2, 3])) is None


def test_damaged_unit_is_left_out_of_the_pictures_and_of_the_set(tmp_path):
    job = job_of(tmp_path, 6, 3)
    (commit, *_) = job.snapshot().commits
    job.transfer_set.store.put(commit.parts[0].path, b"?")
    assert [len(row) for row in shown(gallery_of(job)).values()] == [3, 6, 6, 6]
    assert job.transfer_set.damaged() == {commit.unit}


def test_sample_of_many_units_is_taken_of_some_of_them_alike_and_of_all_classes(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(in_view, "MAX_SAMPLED", 20)
    view = SetView(job_of(tmp_path, 60, 3))
    rows = view.sample(40)
    assert len(rows) == 40
    assert reads.total() == 20
    assert set(rows.labels.tolist()) == {0, 1, 2, 3}
    assert torch.equal(view.sample(40).images, rows.images)


def test_sample_of_few_rows_a_unit_sees_every_class_of_units_that_are_alike(tmp_path):
    job = job_of(tmp_path, 40, 1, "transfer_set.unit={classes: 4, images_per_class: 1}")
    rows = SetView(job).sample(40)
    assert len(rows) == len(job.units) == 40, "a row of each unit"
    assert rows.labels.bincount(minlength=4).min() >= 5
