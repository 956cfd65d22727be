"""Exported sets are read back by those who have no raydfkd: datasets, Pillow, tarfile, webdataset."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from toy import toy_recipe

from raydfkd.data.batches import SyntheticBatch
from raydfkd.data.encodings import Encoding
from raydfkd.data.logits import completed, largest
from raydfkd.data.shards import RAW
from raydfkd.data.transfer_set import TransferSet
from raydfkd.errors import RecipeError, RunError
from raydfkd.export import sets
from raydfkd.export.pictures import distinct, pictures_at, pictures_of
from raydfkd.export.sets import export_set, folder_names
from raydfkd.job import open_job
from raydfkd.units import Request, WorkUnit

NAMES = ("cat", "dog", "horse", "bird")


def filled(uri, *, channels=3, units=3, images=5, part_rows=2, size=(6, 4), encoding=RAW):
    """A set of random images whose rows are told apart by everything."""
    about = {"teacher": {"network": "big"}}
    found = TransferSet(str(uri), digest="d", made_of=about, part_rows=part_rows, encoding=encoding)
    found.create()
    rng = torch.Generator().manual_seed(0)
    rows = {}
    for number in range(units):
        unit = WorkUnit(
            id=f"r00{number}.c-0",
            request=Request(classes=(0, 1, 2, 3), images_per_class=1, seed=70 + number, class_seeds=(0, 0, 0, 0)),
        )
        batch = SyntheticBatch(
            images=torch.randint(0, 256, (images, channels, *size), dtype=torch.uint8, generator=rng),
            labels=torch.arange(images) % 4,
            teacher_logits=torch.randn(images, 4, generator=rng).half(),
            objective=1.0,
        )
        sink = found.open(unit)
        sink.write(batch)
        sink.commit(seconds=0.0)
        for index in range(images):
            name = f"r00{number}_c-0-{70 + number}-{index:05d}"
            rows[name] = (batch.images[index], int(batch.labels[index]), batch.teacher_logits[index].float())
    return found, rows


def pixels_of(picture):
    """A picture as uint8 [C, H, W]."""
    values = torch.from_numpy(np.array(picture))
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_parquet_is_a_data_set_of_pictures_and_named_classes_to_datasets(channels, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(sets, "SHARD_BYTES", channels * 6 * 4 * 4)
    _, rows = filled(tmp_path / "set", channels=channels)
    found = pictures_at(str(tmp_path / "set"))
    export_set(found, "toy", str(tmp_path / "out"), "parquet")
    assert len(list((tmp_path / "out/data").iterdir())) == 4, "shards of four images"
    read = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert read.features["label"].names == ["0", "1", "2", "3"]
    assert len(read) == 15
    for row in read:
        name = f"{row['unit'].replace('.', '_')}-{row['seed']}-{row['index']:05d}"
        pixels, label, logits = rows.pop(name)
        assert torch.equal(pixels_of(row["image"]), pixels)
        assert row["label"] == label
        torch.testing.assert_close(torch.tensor(row["teacher_logits"]), logits)
    assert not rows


@pytest.mark.parametrize("form", ["parquet", "webdataset", "folder"])
def test_set_of_webp_and_the_largest_logits_goes_out_as_any_other_and_the_card_says_what_the_others_are(tmp_path, form):
    _, rows = filled(tmp_path / "set", encoding=Encoding(kind="webp", quality=100, top_k=2))
    found = pictures_at(str(tmp_path / "set"))
    for picture in found:
        pixels, _, logits = rows[picture.name]
        assert torch.equal(pixels_of(Image.open(io.BytesIO(picture.png))), pixels)
        expected = completed(*largest(logits[None], 2), 4)[0].tolist()
        assert picture.teacher_logits == pytest.approx(expected)
    assert export_set(found, "toy", str(tmp_path / "out"), form)["images"] == 15
    card = (tmp_path / "out/README.md").read_text()
    assert "| teacher_logits | the 2 largest as the teacher gave them; the others are equal, and share" in card


def test_card_of_a_set_with_all_logits_says_so(tmp_path):
    filled(tmp_path / "set")
    export_set(pictures_at(str(tmp_path / "set")), "toy", str(tmp_path / "out"), "parquet")
    assert "| teacher_logits | of all classes |" in (tmp_path / "out/README.md").read_text()


def test_single_parquet_file_is_known_to_datasets_without_the_card(tmp_path):
    datasets = pytest.importorskip("datasets")
    filled(tmp_path / "set")
    export_set(pictures_at(str(tmp_path / "set")), "toy", str(tmp_path / "out"), "parquet")
    (file,) = (tmp_path / "out/data").iterdir()
    read = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(read[0]["image"], Image.Image)
    assert isinstance(read.features["label"], datasets.ClassLabel)


def test_tars_hold_picture_class_and_all_else_of_each_image(tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "SHARD_BYTES", 3 * 6 * 4 * 6)
    _, rows = filled(tmp_path / "set")
    export_set(pictures_at(str(tmp_path / "set")), "toy", str(tmp_path / "out"), "webdataset")
    files = {}
    for path in sorted((tmp_path / "out/data").glob("train-*-of-00003.tar")):
        with tarfile.open(path) as tar:
            files |= {member.name: tar.extractfile(member).read() for member in tar}
    assert len(files) == 3 * 15
    for name, (pixels, label, logits) in rows.items():
        assert torch.equal(pixels_of(Image.open(io.BytesIO(files[f"{name}.png"]))), pixels)
        assert files[f"{name}.cls"] == str(label).encode()
        known = json.loads(files[f"{name}.json"])
        assert f"{known['unit'].replace('.', '_')}-{known['seed']}-{known['index']:05d}" == name
        torch.testing.assert_close(torch.tensor(known["teacher_logits"]), logits)


def test_tars_are_samples_to_webdataset(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    _, rows = filled(tmp_path / "set")
    export_set(pictures_at(str(tmp_path / "set")), "toy", str(tmp_path / "out"), "webdataset")
    samples = webdataset.WebDataset([str(*(tmp_path / "out/data").iterdir())], shardshuffle=False).decode("pil")
    found = {sample["__key__"]: (pixels_of(sample["png"]), sample["cls"]) for sample in samples}
    assert {name: label for name, (_, label) in found.items()} == {name: label for name, (_, label, _) in rows.items()}


def test_folders_are_those_of_classes_with_a_picture_for_each_image(tmp_path):
    recipe = toy_recipe(tmp_path, [f"teacher.class_names={list(NAMES)}"])
    job = open_job(recipe)
    job.transfer_set.create()
    for unit in job.units:
        sink = job.transfer_set.open(unit)
        labels = torch.tensor(unit.request.classes).repeat_interleave(3)
        images = labels.view(-1, 1, 1, 1).expand(-1, 1, 8, 8).byte().contiguous()
        sink.write(SyntheticBatch(images=images, labels=labels, teacher_logits=torch.zeros(6, 4).half(), objective=1.0))
        sink.commit(seconds=0.0)
    made = export_set(pictures_of(recipe), recipe.name, str(tmp_path / "out"), "folder")
    assert (made["images"], made["files"]) == (24, 25)
    for label, name in enumerate(NAMES):
        files = sorted((tmp_path / "out" / name).iterdir())
        assert len(files) == 6
        assert all(int(pixels_of(Image.open(file)).unique()) == label for file in files)
        assert files[0].name.startswith(f"{job.units[label // 2].id}-{job.units[label // 2].request.seed}-")


def test_classes_of_one_name_are_told_apart_which_datasets_insists_on():
    assert distinct(["cat", "crane", "dog", "crane"]) == ("cat", "crane (1)", "dog", "crane (3)")


def test_names_of_classes_become_folders_of_their_own_whatever_is_in_them():
    assert folder_names(["cat", "../x", "crane", "Crane", "", "T-shirt/top"]) == [
        *("cat", "___x", "2-crane", "3-Crane", "4", "T-shirt_top")
    ]


def test_shards_are_written_while_the_set_is_read_so_that_memory_does_not_grow_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "SHARD_BYTES", 3 * 6 * 4 * 5)
    filled(tmp_path / "set", units=6, part_rows=5)
    found = pictures_at(str(tmp_path / "set"))
    written, read = [], TransferSet.read

    def watched(transfer_set, part):
        written.append(len(list((tmp_path / "out/data").glob("*"))))
        return read(transfer_set, part)

    monkeypatch.setattr(TransferSet, "read", watched)
    export_set(found, "toy", str(tmp_path / "out"), "parquet")
    assert written == [0, 1, 2, 3, 4, 5]


def test_export_replaces_the_one_before_and_leaves_none_of_its_shards(tmp_path, monkeypatch):
    filled(tmp_path / "set")
    found = pictures_at(str(tmp_path / "set"))
    monkeypatch.setattr(sets, "SHARD_BYTES", 3 * 6 * 4)
    export_set(found, "toy", str(tmp_path / "out"), "webdataset")
    monkeypatch.undo()
    export_set(found, "toy", str(tmp_path / "out"), "parquet")
    assert [path.name for path in (tmp_path / "out/data").iterdir()] == ["train-00000-of-00001.parquet"]


def test_shards_of_another_data_set_are_not_replaced(tmp_path):
    filled(tmp_path / "set")
    (tmp_path / "out/data").mkdir(parents=True)
    (tmp_path / "out/README.md").write_text("mine")
    (tmp_path / "out/data/train-00000-of-00001.parquet").write_bytes(b"mine")
    with pytest.raises(RecipeError, match="shards in data/ that no export has written; give another folder"):
        export_set(pictures_at(str(tmp_path / "set")), "toy", str(tmp_path / "out"), "parquet")
    assert (tmp_path / "out/data/train-00000-of-00001.parquet").read_bytes() == b"mine"


def test_images_of_other_channels_are_refused_with_the_reason_and_the_set_itself_named(tmp_path):
    filled(tmp_path / "set", channels=5)
    with pytest.raises(RecipeError, match=r"images have 5 channels, and picture files have 1, 3 or 4; read the set"):
        pictures_at(str(tmp_path / "set"))


def test_damaged_unit_ends_the_export_with_its_name_and_the_next_leaves_it_out(tmp_path):
    found, _ = filled(tmp_path / "set")
    (commit, *_) = found.snapshot().commits[1:]
    found.store.put(commit.parts[1].path, b"?")
    pictures = pictures_at(str(tmp_path / "set"))
    with pytest.raises(RunError, match=rf"{commit.parts[1].path} is damaged.*leaves unit {commit.unit} out"):
        export_set(pictures, "toy", str(tmp_path / "out"), "folder")
    assert export_set(pictures_at(str(tmp_path / "set")), "toy", str(tmp_path / "out"), "parquet")["images"] == 10


def test_set_of_another_recipe_is_not_exported_under_the_names_of_this_one(tmp_path):
    job = open_job(toy_recipe(tmp_path))
    job.transfer_set.create()
    with pytest.raises(
        RecipeError, match=r"holds a set of another recipe \(synthesis.batch_size is 4 there and 2 here"
    ):
        pictures_of(toy_recipe(tmp_path, ["synthesis.batch_size=2"]))


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: filled(path, units=0)])
def test_place_without_an_image_is_one_line_with_the_remedy(make, tmp_path):
    make(tmp_path / "set")
    with pytest.raises(RecipeError, match=r"there is no (transfer set|image yet).*`raydfkd synthesize` makes"):
        pictures_at(str(tmp_path / "set"))


def test_card_names_classes_teacher_and_number_of_images(tmp_path):
    filled(tmp_path / "set")
    export_set(pictures_at(str(tmp_path / "set")), "toy", str(tmp_path / "out"), "parquet")
    card = Path(tmp_path / "out/README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["dataset_info"]["splits"][0]["num_examples"] == 15
    assert head["dataset_info"]["dataset_size"] == (tmp_path / "out/data/train-00000-of-00001.parquet").stat().st_size
    assert "license" not in head
    assert "| teacher | `big` |" in card
    metadata = pq.read_schema(tmp_path / "out/data/train-00000-of-00001.parquet").metadata
    assert json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"] == ["0", "1", "2", "3"]
