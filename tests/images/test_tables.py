"""Pictures and labels in Parquet files and in data sets of Hugging Face, all on the local disk."""

from __future__ import annotations

import json
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from picture_files import BROKEN, colours, opened, png, refusal, space, write_pictures
from toy import encode_part

from raydfkd.data.batches import SyntheticBatch

NAMES = ("owl", "jay")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def write(path, images, labels, *, metadata=None, rows=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": images, "label": labels})
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=rows)
    return path


def class_labels(names):
    feature = {"names": list(names), "_type": "ClassLabel"}
    return {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}


# Parquet


def test_column_of_bytes_and_one_of_numbers_are_pictures_and_classes(tmp_path):
    file = write(tmp_path / "a.parquet", [png(5), png(6), png(7)], [1, 0, 3])
    data = opened("parquet", 4, files=file)
    assert colours(data, size=2) == ([(5, 1), (6, 0), (7, 3)], [])
    assert data.class_names == ("0", "1", "2", "3")
    assert data.notes == ("real_data has no images of 1 of the teacher's 4 classes (2)",)


def test_struct_of_bytes_and_path_is_a_picture(tmp_path):
    file = write(tmp_path / "a.parquet", [{"bytes": png(5), "path": None}, {"bytes": png(6), "path": "6.png"}], [1, 0])
    assert colours(opened("parquet", 2, files=file))[0] == [(5, 1), (6, 0)]


def test_texts_are_the_teacher_s_classes_of_those_names(tmp_path):
    file = write(tmp_path / "a.parquet", [png(5), png(6)], ["jay", "Owl"])
    data = opened("parquet", 2, NAMES, files=file)
    assert colours(data)[0] == [(5, 1), (6, 0)]
    assert "label 'kite' is none of the teacher's 2 classes" in refusal(
        "parquet", 2, NAMES, files=write(tmp_path / "b.parquet", [png(5), png(6)], ["jay", "kite"])
    )


def test_numbers_with_names_in_the_metadata_are_the_classes_of_those_names(tmp_path):
    file = write(tmp_path / "a.parquet", [png(5), png(6)], [0, 1], metadata=class_labels(["jay", "owl"]))
    assert colours(opened("parquet", 2, NAMES, files=file))[0] == [(5, 1), (6, 0)]
    unnamed = opened("parquet", 2, files=file)
    assert colours(unnamed)[0] == [(5, 0), (6, 1)]
    assert (unnamed.class_names, unnamed.notes) == (("jay", "owl"), ())


def test_columns_of_other_names_are_given_and_misspelled_ones_refused(tmp_path):
    pq.write_table(pa.table({"img": [png(5)], "fine_label": [1]}), tmp_path / "a.parquet")
    file = tmp_path / "a.parquet"
    assert colours(opened("parquet", 2, files=file, image="img", label="fine_label"))[0] == [(5, 1)]
    assert refusal("parquet", 2, files=file, image="img", label="fine_labl") == (
        f"real_data.label is 'fine_labl', but {file} has no such column; did you mean fine_label?"
    )


def test_globs_folders_and_lists_are_read_in_the_order_of_their_names(tmp_path):
    for number in (2, 1, 3):
        write(tmp_path / f"set/part-{number}.parquet", [png(number)], [0])
    for files in (
        f"{tmp_path}/set/*.parquet",
        tmp_path / "set",
        [f"{tmp_path}/set/part-{n}.parquet" for n in (1, 2, 3)],
    ):
        assert [colour for colour, _ in colours(opened("parquet", 2, files=files))[0]] == [1, 2, 3]


def test_files_of_an_object_store_are_read(tmp_path):
    import fsspec

    fsspec.filesystem("memory").pipe("/judging/a.parquet", write(tmp_path / "a.parquet", [png(5)], [1]).read_bytes())
    assert colours(opened("parquet", 2, files="memory://judging/*.parquet"))[0] == [(5, 1)]


def test_splits_are_files_of_their_own(tmp_path):
    files = {
        split: str(write(tmp_path / f"{split}.parquet", [png(number)], [0]))
        for number, split in enumerate(("train", "test"))
    }
    data = opened("parquet", 2, files=files)
    assert data.splits == ("train", "test")
    assert [colours(data, split)[0] for split in data.splits] == [[(0, 0)], [(1, 0)]]
    assert "no test, which judges" in refusal("parquet", 2, files={"train": files["train"]})


def test_broken_and_missing_pictures_of_a_table_are_named_by_their_rows(tmp_path):
    file = write(tmp_path / "a.parquet", [png(5), BROKEN, None, png(6)], [1, 1, 0, None])
    assert colours(opened("parquet", 2, files=file)) == ([(5, 1)], [f"row {row} of {file}" for row in (1, 2, 3)])


@pytest.mark.parametrize("size", [(4, 5), (8, 8)])
def test_part_of_a_transfer_set_is_read_as_it_is_or_in_the_teacher_s_size(tmp_path, size):
    batch = SyntheticBatch(
        images=torch.tensor([10, 20], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 5).contiguous(),
        labels=torch.tensor([1, 0]),
        teacher_logits=torch.zeros(2, 2).half(),
        objective=0.0,
    )
    (tmp_path / "part.parquet").write_bytes(encode_part([batch], unit="u", seed=0, first_index=0))
    data = opened("parquet", 2, files=tmp_path / "part.parquet", image_space=space(size))
    assert colours(data)[0] == [(10, 1), (20, 0)]


def test_raw_pixels_of_the_teacher_s_shape_need_not_be_a_picture_s(tmp_path):
    field = pa.field("image", pa.binary(2 * 8 * 8), metadata={"shape": "2,8,8"})
    pixels = np.full(2 * 8 * 8, 77, np.uint8).tobytes()
    table = pa.table([pa.array([pixels], field.type), [1]], schema=pa.schema([field, ("label", pa.int64())]))
    pq.write_table(table, tmp_path / "a.parquet")
    assert colours(opened("parquet", 2, files=tmp_path / "a.parquet", image_space=space(8, 2)))[0] == [(77, 1)]
    assert "channels is 2, but" in refusal(
        "parquet", 2, files=write(tmp_path / "b.parquet", [png(1)], [1]), image_space=space(8, 2)
    )


def test_files_that_are_not_there_or_no_parquet_are_refused(tmp_path):
    assert refusal("parquet", 2, files=f"{tmp_path}/*.parquet") == (
        f"real_data.files is '{tmp_path}/*.parquet': there is no such file; give a path, a glob or a folder"
    )
    (tmp_path / "a.parquet").write_bytes(b"<html>")
    assert refusal("parquet", 2, files=tmp_path / "a.parquet").startswith(
        f"real_data.files: {tmp_path}/a.parquet is no Parquet file ("
    )


def test_number_beyond_the_classes_is_refused_before_any_work(tmp_path):
    file = write(tmp_path / "a.parquet", [png(5), png(5)], [0, 2])
    assert refusal("parquet", 2, files=file) == (
        "real_data: label '2' is none of the teacher's classes, whose numbers are 0 to 1; rename it, or say which it "
        "is, as real_data.classes={2: NUMBER}"
    )
    assert colours(opened("parquet", 2, files=file, classes={"2": 1}))[0] == [(5, 0), (5, 1)]


# Hugging Face


def hf(path, count, names=None, /, **options):
    return opened("huggingface", count, names, name=path, **options)


def table_of(images, labels, names=("jay", "owl")):
    label = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": label})
    rows = {"image": [{"bytes": image, "path": None} for image in images], "label": labels}
    return datasets.Dataset.from_dict(rows, features=features)


def test_data_set_that_was_saved_to_a_folder_judges_by_its_names(tmp_path):
    splits = {"train": table_of([png(1)], [0]), "validation": table_of([png(2), BROKEN, png(3)], [0, 1, 1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    data = hf(tmp_path / "saved", 2, NAMES)
    assert colours(data) == ([(2, 1), (3, 0)], ["row 1 of validation"])
    assert colours(data, "train")[0] == [(1, 1)]


def test_one_saved_table_is_the_test_split(tmp_path):
    table_of([png(2)], [1], names=None).save_to_disk(tmp_path / "saved")
    data = hf(tmp_path / "saved", 3)
    assert (colours(data)[0], data.splits) == ([(2, 1)], ("test",))


def test_folder_of_pictures_is_a_data_set_as_well(tmp_path):
    root = write_pictures(tmp_path / "folder", {f"test/{name}/1.png": number for number, name in enumerate(NAMES)})
    data = hf(root, 2, NAMES)
    assert sorted(colours(data)[0]) == [(0, 0), (1, 1)]


def test_split_of_another_name_is_given(tmp_path):
    datasets.DatasetDict({"held": table_of([png(2)], [1])}).save_to_disk(tmp_path / "saved")
    assert colours(hf(tmp_path / "saved", 2, splits={"test": "held"}))[0] == [(2, 1)]
    assert refusal("huggingface", 2, name=tmp_path / "saved") == (
        f"real_data.name '{tmp_path}/saved' has held and no split that judges; give real_data.splits={{test: NAME}}"
    )


def test_misspelled_column_is_named(tmp_path):
    table_of([png(2)], [1]).save_to_disk(tmp_path / "saved")
    assert refusal("huggingface", 2, name=tmp_path / "saved", label="lable").endswith("did you mean label?")


def test_data_set_that_is_not_there_is_refused(tmp_path):
    assert refusal("huggingface", 2, name=tmp_path / "no").startswith(
        f"real_data.name is '{tmp_path}/no', which datasets cannot open ("
    )


def test_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal("huggingface", 2, name=tmp_path) == (
        "real_data.kind is huggingface, which needs datasets; pip install 'raydfkd[hf]'"
    )
