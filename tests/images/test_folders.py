"""Pictures in class folders, in folders of splits, and in ImageNet's flat validation folder."""

from __future__ import annotations

import shutil

import pytest
from picture_files import BROKEN, colours, opened, refusal, space, write_pictures

from raydfkd.errors import RecipeError
from raydfkd.images import pictures
from raydfkd.images.real_data import some_of

BIRDS = {"crow/1.png": 1, "crow/deep/2.png": 2, "jay/1.png": 3, "owl/1.png": 4}
NAMES = ("owl", "jay", "crow", "kite")


def folder(root, count, names=None, /, **options):
    return opened("image_folder", count, names, root=root, **options)


def complaint(root, count=3, names=None, /, **options):
    return refusal("image_folder", count, names, root=root, **options)


@pytest.fixture
def birds(tmp_path):
    return write_pictures(tmp_path / "birds", BIRDS)


# Which folder is which class


def test_class_folders_are_the_teacher_s_classes_of_those_names(birds):
    data = folder(birds, 4, NAMES)
    assert colours(data) == ([(1, 2), (2, 2), (3, 1), (4, 0)], [])
    assert data.class_names == NAMES
    assert data.notes == ("real_data has no images of 1 of the teacher's 4 classes (kite)",)


def test_case_spaces_and_underscores_of_names_do_not_matter(tmp_path):
    root = write_pictures(tmp_path, {"snowy_owl/1.png": 1, "Blue-Jay/1.png": 2})
    assert colours(folder(root, 2, ("blue jay", "Snowy Owl, Bubo scandiacus")))[0] == [(2, 0), (1, 1)]


def test_folders_with_numbers_are_the_classes_of_those_numbers(tmp_path):
    root = write_pictures(tmp_path, {"2/1.png": 1, "10/1.png": 2})
    assert sorted(colours(folder(root, 11))[0]) == [(1, 2), (2, 10)]


def test_folders_that_nobody_names_are_the_classes_in_sorted_order_and_that_is_said(birds):
    data = folder(birds, 3)
    assert [label for _, label in colours(data)[0]] == [0, 0, 1, 2]
    assert data.class_names == ("crow", "jay", "owl")
    (note,) = data.notes
    assert note == (
        "real_data: its 3 classes (crow, jay, owl) are taken for the teacher's in sorted order; another one is given "
        "as real_data.classes"
    )


def test_as_many_folders_with_none_of_the_teacher_s_names_are_in_sorted_order(birds):
    data = folder(birds, 3, ("a", "b", "c"))
    assert [label for _, label in colours(data)[0]] == [0, 0, 1, 2]
    assert data.class_names == ("a", "b", "c")
    assert "sorted order" in data.notes[0]


def test_classes_are_mapped_by_hand(birds):
    assert colours(folder(birds, 9, classes={"crow": 3, "jay": 8, "owl": 8}))[0] == [(1, 3), (2, 3), (3, 8), (4, 8)]
    assert colours(folder(birds, 3, classes=["owl", "crow", "jay"]))[0] == [(1, 1), (2, 1), (3, 2), (4, 0)]


def test_a_folder_that_is_mapped_by_hand_need_not_have_a_name_that_the_teacher_knows(birds):
    assert colours(folder(birds, 4, ("owl", "jay", "corvus", "kite"), classes={"crow": 2}))[0][0] == (1, 2)


def test_class_folder_that_the_teacher_does_not_have_is_named(birds):
    assert complaint(birds, 4, ("crow", "jay", "owls", "kite")) == (
        "real_data: class folder 'owl' is none of the teacher's 4 classes; did the teacher call it 'owls'? rename it, "
        "say which it is, as real_data.classes={owl: NUMBER}, or leave it out"
    )


def test_folders_that_are_not_as_many_as_the_classes_need_names(birds):
    assert complaint(birds, 9) == (
        "real_data: nobody knows which of the teacher's 9 classes each class folder is (crow, jay, owl); give "
        "teacher.class_names, or real_data.classes={crow: NUMBER}"
    )


def test_number_beyond_the_classes_is_refused(tmp_path):
    root = write_pictures(tmp_path, {"1/1.png": 1, "2/1.png": 2})
    assert complaint(root, 2) == (
        "real_data: class folder '2' is none of the teacher's classes, whose numbers are 0 to 1; rename it, or say "
        "which it is, as real_data.classes={2: NUMBER}"
    )


def test_name_of_several_classes_is_ambiguous(birds):
    assert "'crow' may be any of the teacher's classes 0, 3" in complaint(birds, 4, ("crow", "jay", "owl", "crow"))


def test_map_of_a_folder_that_is_not_there_is_refused(birds):
    assert complaint(birds, classes={"crw": 1}) == (
        "real_data.classes.crw: there is no such class folder; did you mean crow?"
    )
    assert complaint(birds, classes={"crow": 3}) == "real_data.classes.crow is 3, but the teacher's classes are 0 to 2"


# Pictures


def test_pictures_have_the_teacher_s_size_and_channels(birds):
    data = folder(birds, 3, image_space=space((6, 10), 1))
    (images, _), *_ = data.load("test").batches(3)
    assert tuple(images.shape) == (3, 1, 6, 10)


def test_batches_are_of_the_size_that_is_asked_for_and_begin_anew(birds):
    split = folder(birds, 3).load("test")
    for _ in range(2):
        assert [len(labels) for _, labels in split.batches(3)] == [3, 1]


def test_broken_picture_is_named_and_left_out(birds):
    write_pictures(birds, {"crow/deep/3.jpg": BROKEN, "jay/notes.txt": b"no picture", "jay/.hidden.png": BROKEN})
    assert colours(folder(birds, 3)) == ([(1, 0), (2, 0), (3, 1), (4, 2)], ["crow/deep/3.jpg"])


def test_set_of_which_every_picture_is_broken_is_refused_before_any_work(tmp_path):
    root = write_pictures(tmp_path, {"a/1.png": BROKEN, "b/1.png": BROKEN})
    assert complaint(root, 2) == "real_data: image_folder, split test has no picture that can be read"


# Splits


def test_splits_in_folders_of_their_own_are_read_from_there(tmp_path):
    files = {f"{split}/crow/1.png": colour for colour, split in enumerate(("train", "val", "test"))}
    data = folder(write_pictures(tmp_path, {**files, "train/jay/1.png": 9}), 2)
    found = {split: colours(data, split)[0] for split in data.splits}
    assert found == {"train": [(0, 0), (9, 1)], "validation": [(1, 0)], "test": [(2, 0)]}


def test_without_a_test_folder_the_validation_folder_judges_and_that_is_said(tmp_path):
    data = folder(write_pictures(tmp_path, {"train/crow/1.png": 1, "val/crow/1.png": 2, "val/jay/1.png": 3}), 2)
    assert colours(data)[0] == [(2, 0), (3, 1)]
    assert "real_data.root has no test folder; val judges" in data.notes


def test_folder_called_train_among_class_folders_is_a_class(tmp_path):
    data = folder(write_pictures(tmp_path, {"train/1.png": 1, "bus/1.png": 2}), 2)
    assert data.class_names == ("bus", "train")


def test_split_of_another_name_is_given(tmp_path):
    root = write_pictures(tmp_path, {"2019/crow/1.png": 1, "2020/crow/1.png": 2, "2020/jay/1.png": 3})
    assert colours(folder(root, 2, splits={"test": "2020"}))[0] == [(2, 0), (3, 1)]
    assert "real_data.splits.test is '2021', but" in complaint(root, 2, splits={"test": "2021"})


def test_folder_without_splits_is_all_test_and_has_no_others(birds):
    data = folder(birds, 3)
    assert data.splits == ("test",)
    with pytest.raises(RecipeError, match="^real_data: image_folder has no train images here, only test$"):
        data.load("train")


def test_shares_divide_a_folder_once_and_for_all(tmp_path):
    files = {f"{label}/{number}.png": number for label in "ab" for number in range(60)}
    shares = {"train": 0.5, "validation": 0.2}
    data = folder(write_pictures(tmp_path / "one", files), 2, splits=shares)
    found = {split: colours(data, split)[0] for split in data.splits}
    assert sorted(sum(found.values(), [])) == sorted((number, label) for label in (0, 1) for number in range(60))
    assert [round(len(rows) / 120, 1) for rows in found.values()] == [0.5, 0.2, 0.3]
    fewer = dict(list(files.items())[::3])
    again = folder(write_pictures(tmp_path / "other", fewer), 2, splits=shares)
    assert all(set(colours(again, split)[0]) <= set(rows) for split, rows in found.items())


def test_shares_that_leave_nothing_to_judge_on_are_refused(birds):
    assert "leave some for test" in complaint(birds, splits={"train": 0.9, "validation": 0.1})


# ImageNet's flat folder of validation


FLAT = {"ILSVRC2012_val_00000002.png": 2, "ILSVRC2012_val_00000001.png": 1}


@pytest.mark.parametrize(
    "lines",
    [
        "ILSVRC2012_val_00000001.png 0\nILSVRC2012_val_00000002.png 1\n",
        "ILSVRC2012_val_00000002.png,1\nILSVRC2012_val_00000001.png,0",
        "0\n1\n",
        "tench\ngoldfish\n",
    ],
)
def test_flat_folder_takes_its_labels_from_a_file(tmp_path, lines):
    root = write_pictures(tmp_path / "flat", FLAT)
    (tmp_path / "labels.txt").write_text(lines)
    data = folder(root, 2, ("tench", "goldfish"), labels=tmp_path / "labels.txt")
    assert colours(data)[0] == [(1, 0), (2, 1)]


def test_flat_validation_beside_class_folders_of_training_has_their_names(tmp_path):
    root = write_pictures(tmp_path / "net", {"train/n01/1.png": 7, "train/n02/1.png": 8})
    write_pictures(root / "val", FLAT)
    (tmp_path / "labels.txt").write_text("n02\nn01\n")
    data = folder(root, 2, labels=tmp_path / "labels.txt")
    assert colours(data)[0] == [(1, 1), (2, 0)]
    assert colours(data, "train")[0] == [(7, 0), (8, 1)]


def test_numbers_from_one_as_those_of_imagenet_s_own_list_are_refused(tmp_path):
    root = write_pictures(tmp_path / "flat", FLAT)
    (tmp_path / "truth.txt").write_text("1\n2\n")
    assert "label '2' is none of the teacher's classes, whose numbers are 0 to 1" in complaint(
        root, 2, labels=tmp_path / "truth.txt"
    )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("1\n", "has 1 labels, but"),
        ("ILSVRC2012_val_00000001.png 0\n", "1 of them (first ILSVRC2012_val_00000002.png) are not in"),
        ("ILSVRC2012_val_00000001.png 0\nILSVRC2012_val_00000002.png\n", "whose line 2 has no label; give one"),
    ],
)
def test_file_of_labels_that_does_not_fit_is_refused(tmp_path, lines, message):
    root = write_pictures(tmp_path / "flat", FLAT)
    (tmp_path / "labels.txt").write_text(lines)
    assert message in complaint(root, 2, labels=tmp_path / "labels.txt")


def test_file_of_labels_that_is_not_there_is_refused(tmp_path):
    root = write_pictures(tmp_path / "flat", FLAT)
    assert complaint(root, labels=tmp_path / "no.txt") == (
        f"real_data.labels is '{tmp_path}/no.txt', which cannot be read: No such file or directory"
    )


# What is not there


def test_root_that_is_not_there_is_refused(tmp_path):
    assert complaint(tmp_path / "no") == (
        f"real_data.root is '{tmp_path}/no': there is no such folder; give that of the class folders"
    )


def test_root_without_class_folders_is_refused(tmp_path):
    assert complaint(tmp_path) == (
        f"real_data.root: '{tmp_path}' has no class folders; put the pictures into a folder for each class"
    )
    write_pictures(tmp_path, FLAT)
    assert complaint(tmp_path).endswith("has no class folders; give the file of their labels as real_data.labels")


def test_class_folder_without_pictures_is_named(birds):
    shutil.rmtree(birds / "jay")
    (birds / "jay").mkdir()
    (birds / "jay" / "readme.txt").write_text("none yet")
    assert complaint(birds) == (f"real_data.root: class folder '{birds}/jay' has no pictures; add some, or remove it")


def test_channels_that_pictures_do_not_have_are_refused_before_any_is_read(birds):
    assert "channels is 2, but picture files have 1, 3 or 4" in complaint(birds, image_space=space(8, 2))


def test_some_pictures_of_a_folder_are_spread_over_its_classes_and_the_others_not_decoded(tmp_path, monkeypatch):
    files = {f"{name}/{number:02}.png": 10 * label + number for label, name in enumerate("abcd") for number in range(8)}
    data = folder(write_pictures(tmp_path / "birds", files | {"a/broken.png": BROKEN}), 4, tuple("abcd"))
    opened_files, read = [], pictures.Image.open
    monkeypatch.setattr(pictures.Image, "open", lambda source: opened_files.append(source) or read(source))
    found = some_of(data.load("test"), 11)
    assert len(opened_files) == 11
    assert found.labels.bincount(minlength=4).min() >= 2
    assert len(some_of(data.load("test"), 100).labels) == 32, "all that can be decoded"
