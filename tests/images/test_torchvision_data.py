"""Data sets of torchvision, from files as torchvision lays them out."""

from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
from picture_files import BROKEN, colours, opened, refusal, space, write_pictures
from test_real_data import write_idx

from raydfkd.images.torchvision_data import SETS

NAMES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-10 with 20 pictures of training and 2 of test; picture i has colour and label i."""
    from torchvision import datasets  # takes seconds, of every process that collects the tests

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(count):
        data = np.repeat(np.arange(count, dtype=np.uint8)[:, None], 3072, 1)
        return {"data": data, "labels": [number % 10 for number in range(count)]}

    meta = write("batches.meta", {"label_names": list(NAMES)})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [write("data_batch_1", batch(20))])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [write("test_batch", batch(2))])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    return tmp_path


def test_pictures_and_class_names_of_cifar_are_read(cifar):
    data = opened("torchvision:CIFAR10", 10, root=cifar, image_space=space(32))
    assert colours(data)[0] == [(0, 0), (1, 1)]
    assert (data.class_names, data.notes) == (NAMES, ())


def test_validation_is_every_tenth_picture_of_training(cifar):
    data = opened("torchvision:CIFAR10", 10, root=cifar)
    assert colours(data, "validation")[0] == [(9, 9), (19, 9)]
    assert [colour for colour, _ in colours(data, "train")[0]] == [*range(9), *range(10, 19)]


def test_teacher_whose_classes_are_in_another_order_is_judged_by_names(cifar):
    data = opened("torchvision:CIFAR10", 10, NAMES[::-1], root=cifar)
    assert colours(data)[0] == [(0, 9), (1, 8)]


def test_other_names_for_as_many_classes_are_taken_in_the_set_s_order_and_that_is_said(cifar):
    data = opened("torchvision:CIFAR10", 10, tuple("abcdefghij"), root=cifar)
    assert colours(data)[0] == [(0, 0), (1, 1)]
    assert data.notes == (
        "real_data: its 10 classes (plane, car, bird, cat, deer and 5 more) are taken for the teacher's in their own "
        "order; another one is given as real_data.classes",
    )


def test_set_without_splits_is_divided_by_tenths_and_a_broken_file_of_it_is_left_out(tmp_path):
    files = {f"{number:02d}.jpg": number for number in range(30)} | {"19.jpg": BROKEN}
    write_pictures(tmp_path / "eurosat" / "2750" / "Forest", files)
    write_pictures(tmp_path / "eurosat" / "2750" / "River", {"30.jpg": 30})
    data = opened("torchvision:EuroSAT", 2, root=tmp_path)
    assert colours(data) == ([(9, 0), (29, 0)], ["number 19 of EuroSAT"])
    assert colours(data, "validation")[0] == [(8, 0), (18, 0), (28, 0)]
    assert [colour for colour, _ in colours(data, "train")[0]] == [n for n in range(31) if n % 10 < 8]


def test_teacher_of_other_classes_is_refused(cifar):
    assert refusal("torchvision:CIFAR10", 4, root=cifar).startswith(
        "real_data: nobody knows which of the teacher's 4 classes each class of CIFAR10 is (plane, car, "
    )


def test_grey_pictures_judge_a_teacher_of_coloured_ones(tmp_path):
    write_idx(tmp_path / "MNIST" / "raw")
    data = opened("torchvision:MNIST", 10, root=tmp_path, image_space=space(32, 3))
    (images, labels), *_ = data.load("test").batches(2)
    assert tuple(images.shape) == (2, 3, 32, 32)
    assert labels.tolist() == [0, 1]
    assert data.class_names[3] == "3 - three"


def test_unknown_data_set_is_refused():
    assert refusal("torchvision:CIFAR11", 10, root="x") == (
        "real_data: torchvision has no classification data set 'CIFAR11'; did you mean CIFAR10?"
    )


@pytest.mark.parametrize("name", sorted(SETS))
def test_files_that_are_not_there_are_refused_without_a_download(tmp_path, name):
    message = refusal(f"torchvision:{name}", 10, root=tmp_path)
    if "needs" not in message:  # a package that torchvision reads it with
        assert message.startswith(f"real_data.root is '{tmp_path}': {name} cannot be opened there (")
        assert "give the folder that torchvision has it in" in message
    assert not list(tmp_path.iterdir())


def test_unknown_option_is_refused(tmp_path):
    assert refusal("torchvision:CIFAR10", 10, rot=tmp_path) == "real_data.rot: unknown key; did you mean root?"
