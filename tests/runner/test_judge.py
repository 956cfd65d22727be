"""Judging on real pictures: the figures of a report, what is left out, and how much of it is in memory at once."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from toy import CLASSES, SPACE, batchnorm_teacher, plain_teacher, toy_recipe

import raydfkd
from raydfkd.distillation.evaluate import BATCH, BATCH_BYTES, batch_size, judge
from raydfkd.errors import RecipeError
from raydfkd.images.pictures import read_picture
from raydfkd.images.pixels import PixelRange
from raydfkd.images.real_data import in_memory
from raydfkd.images.streams import AHEAD, Picture, PictureStream
from raydfkd.runner.check import check
from raydfkd.runner.events import Events, Listener
from raydfkd.runner.teach import judging_data, teach

CLASS_NAMES = ("crow", "jay", "kite", "owl")
PICTURES = 6


@pytest.fixture
def birds(tmp_path):
    """Class folders of noise for three of the four classes, and a broken picture in one of them."""
    rng = np.random.default_rng(0)
    for name in CLASS_NAMES[:3]:
        folder = tmp_path / "birds" / name
        folder.mkdir(parents=True)
        for number in range(PICTURES):
            Image.fromarray(rng.integers(0, 256, (9, 11), dtype=np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "birds" / "jay" / "broken.jpg").write_bytes(b"\xff\xd8 torn")
    return tmp_path / "birds"


def of_birds(folder, birds, *overrides):
    names = f"teacher.class_names=[{','.join(CLASS_NAMES)}]"
    return toy_recipe(folder, [f"real_data={{kind: image_folder, root: {birds}}}", names, *overrides])


def test_report_has_the_figures_of_an_image_folder(tmp_path, birds):
    result = raydfkd.run(of_birds(tmp_path, birds))
    report = result.report
    paths = [(path, label) for label, name in enumerate(CLASS_NAMES) for path in sorted(birds.glob(f"{name}/*.png"))]
    images = torch.stack([read_picture(path, SPACE) for path, _ in paths])
    labels = torch.tensor([label for _, label in paths])
    answers = batchnorm_teacher()(PixelRange(SPACE).from_uint8(images)).argmax(1)
    right = answers == labels
    assert report["teacher"]["top1"] == pytest.approx(right.double().mean().item())
    assert report["teacher"]["per_class"] == [
        *(right[labels == label].double().mean().item() for label in range(3)),
        None,
    ]
    assert report["teacher"]["top5"] is None, "there are four classes"
    assert 0 <= report["student"]["ece"] <= 1
    assert report["images_per_class"] == [PICTURES, PICTURES, PICTURES, 0]
    assert report["class_names"] == list(CLASS_NAMES)
    matrix = torch.tensor(report["confusion"]["teacher"]["matrix"])
    assert torch.equal(matrix, torch.bincount(labels * CLASSES + answers, minlength=CLASSES**2).view(CLASSES, CLASSES))
    assert (report["judged_on"], report["judged_images"]) == ("real image_folder test images", 3 * PICTURES)
    assert report["skipped_pictures"] == {"count": 1, "first": ["jay/broken.jpg"]}
    assert "1 real picture that cannot be decoded is left out: jay/broken.jpg" in report["warnings"]
    assert "jay/broken.jpg" in result.page.read_text()
    judged = raydfkd.evaluate(result.job.recipe)
    assert judged == {key: report[key] for key in judged}


def test_many_broken_pictures_are_counted_and_the_first_ones_named(tmp_path, birds):
    for number in range(30):
        (birds / "crow" / f"{number:02d}.jpg").write_bytes(b"torn")
    report = raydfkd.run(of_birds(tmp_path, birds)).report
    assert report["skipped_pictures"]["count"] == 31
    assert report["skipped_pictures"]["first"] == [f"crow/{number:02d}.jpg" for number in range(10)]
    (warning,) = [line for line in report["warnings"] if "decoded" in line]
    assert warning.startswith("31 real pictures that cannot be decoded are left out: crow/00.jpg, ")
    assert warning.endswith("crow/09.jpg, ...")


def test_classes_without_pictures_are_said_before_work(tmp_path, birds):
    notes = check(of_birds(tmp_path, birds)).notes
    assert "real_data has no images of 1 of the teacher's 4 classes (owl)" in notes


def test_synthetic_images_have_no_labels_to_judge_by(tmp_path):
    report = raydfkd.run(toy_recipe(tmp_path)).report
    figures = {"top1": None, "top5": None, "ece": None, "per_class": None, "parameters": 300}
    assert {**figures, "estimate": report["student"]["estimate"]} == report["student"]
    assert report["class_names"] is report["images_per_class"] is report["confusion"] is None
    assert report["agreement"] is None


def test_class_folder_of_another_name_ends_the_run_before_it_begins(tmp_path, birds):
    (birds / "jay").rename(birds / "jey")
    with pytest.raises(
        RecipeError, match="class folder 'jey' is none of the teacher's 4 classes; did .* call it 'jay'"
    ):
        raydfkd.run(of_birds(tmp_path, birds))
    assert not (tmp_path / "run").exists()


# Memory


class Alive:
    """Counts the pictures that are in memory."""

    def __init__(self):
        self.now = self.most = 0

    def picture(self, number):
        def read():
            image = torch.full((1, 8, 8), number % 256, dtype=torch.uint8)
            weakref.finalize(image, self.leave)
            self.now += 1
            self.most = max(self.most, self.now)
            return image, number % CLASSES

        return Picture(str(number), read)

    def leave(self):
        self.now -= 1


@pytest.mark.parametrize("count", [200, 4000])
def test_no_more_pictures_are_in_memory_of_many_than_of_few(count):
    alive, batches, most_batches = Alive(), weakref.WeakSet(), 0
    stream = PictureStream(lambda: map(alive.picture, range(count)))

    def watched():
        nonlocal most_batches
        for images, labels in stream.batches(50):
            batches.add(images)
            most_batches = max(most_batches, len(batches))
            yield images, labels

    found = judge(plain_teacher(), batchnorm_teacher(), watched(), PixelRange(SPACE), classes=CLASSES)
    assert found.images == sum(found.student.images_per_class) == count
    assert alive.most <= 50 + AHEAD
    assert most_batches <= 2


@pytest.mark.parametrize(("size", "expected"), [(28, BATCH), (224, 111), (5000, 1)])
def test_batch_of_large_pictures_is_small(size, expected):
    space = SPACE.model_copy(update={"channels": 3, "size": size})
    assert batch_size(space) == expected
    assert batch_size(space) == 1 or batch_size(space) * 12 * size**2 <= BATCH_BYTES


# Teaching


class Lines(Listener):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, topic: str, text: str) -> None:
        self.lines.append(text)


TAUGHT = ("teacher.train={epochs: 1, batch_size: 4}", "teacher.weights=${run_dir}/taught.safetensors")


def test_teacher_is_taught_on_a_share_of_an_image_folder_and_tried_on_another(tmp_path, birds, caplog):
    said = Lines()
    shares = "real_data.splits={train: 0.5, validation: 0.2}"
    teach(of_birds(tmp_path, birds, *TAUGHT, shares), Events(said))
    assert "on the validation split" in said.lines[-1]
    (birds / "jay" / "2.png").write_bytes(b"torn")
    teach(of_birds(tmp_path, birds, *TAUGHT, "real_data.splits={train: 0.85}"), Events(said))
    assert "on the test split" in said.lines[-1]
    assert "1 real picture that cannot be decoded is left out: jay/2.png" in caplog.text


def test_folder_without_a_training_split_teaches_nobody(tmp_path, birds):
    message = "teacher.train: image_folder has no train images here, only test; give real_data.splits"
    with pytest.raises(RecipeError, match=message):
        check(of_birds(tmp_path, birds, *TAUGHT))


def test_split_as_a_whole_has_the_pictures_of_its_batches_in_order(tmp_path, birds):
    split = judging_data(of_birds(tmp_path, birds)).load("test")
    broken = []
    whole = in_memory(split, broken.append)
    assert whole.images.shape == (3 * PICTURES, 1, 8, 8)
    assert broken == ["jay/broken.jpg"]
    assert torch.equal(whole.images, torch.cat([images for images, _ in split.batches(4)]))
    assert in_memory(whole) is whole
