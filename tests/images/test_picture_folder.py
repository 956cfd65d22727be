"""Folders of real pictures that a synthesis may read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from toy import SPACE, save_pictures

from raydfkd.config.schema import ImageSpace
from raydfkd.errors import RecipeError
from raydfkd.images import picture_folder, pictures
from raydfkd.images.picture_folder import not_data_free, read_folder


def read(folder: Path, space: ImageSpace = SPACE) -> picture_folder.PictureFolder:
    return read_folder(str(folder), space, where="synthesis.statistics")


def refusal(folder: Path, space: ImageSpace = SPACE) -> str:
    with pytest.raises(RecipeError) as refused:
        read(folder, space)
    return str(refused.value)


def test_pictures_come_in_the_order_of_their_names(tmp_path):
    images = save_pictures(tmp_path, 3)
    assert torch.equal(read(tmp_path).images, images)
    os.rename(tmp_path / "000.png", tmp_path / "zzz.png")
    assert torch.equal(read(tmp_path).images, images[[1, 2, 0]])


def test_digest_is_of_names_and_contents_and_not_of_the_place(tmp_path):
    save_pictures(tmp_path / "here", 3)
    expected = read(tmp_path / "here").sha256
    shutil.copytree(tmp_path / "here", tmp_path / "deep/there")
    assert read(tmp_path / "deep/there").sha256 == expected
    (tmp_path / "here/notes.txt").write_text("no picture")
    assert read(tmp_path / "here").sha256 == expected
    os.rename(tmp_path / "here/002.png", tmp_path / "here/003.png")
    assert read(tmp_path / "here").sha256 != expected
    shutil.copy(tmp_path / "deep/there/000.png", tmp_path / "deep/there/001.png")
    assert read(tmp_path / "deep/there").sha256 != expected


def test_folder_is_decoded_once_and_again_where_a_file_is_another(tmp_path, monkeypatch):
    decoded = []
    original = pictures.read_picture
    monkeypatch.setattr(picture_folder, "read_picture", lambda *given: decoded.append(given) or original(*given))
    save_pictures(tmp_path, 3)
    assert read(tmp_path) is read(tmp_path)
    assert len(decoded) == 3
    images = save_pictures(tmp_path, 3, seed=1)
    os.utime(tmp_path / "000.png", (1, 1))
    assert torch.equal(read(tmp_path).images, images)


def test_broken_picture_is_named_and_skipped(tmp_path):
    images = save_pictures(tmp_path, 4)
    (tmp_path / "001.png").write_bytes(b"\x89PNG and no more")
    found = read(tmp_path)
    assert torch.equal(found.images, images[[0, 2, 3]])
    (note,) = found.notes("synthesis.statistics")
    assert note.startswith("synthesis.statistics: skipped 1 of 4 pictures: 001.png cannot be decoded (")
    for name in range(10, 15):
        (tmp_path / f"{name}.png").write_bytes(b"")
    assert read(tmp_path).notes("x")[0].startswith("x: skipped 6 of 9 pictures: 001.png cannot be")
    assert read(tmp_path).notes("x")[0].endswith(" and 3 more")


def test_whole_pictures_need_no_note(tmp_path):
    save_pictures(tmp_path, 2)
    assert read(tmp_path).notes("x") == []


def test_folder_without_enough_pictures_is_refused(tmp_path):
    where = f"synthesis.statistics is '{tmp_path / 'a'}'"
    expected = f"{where}: no such folder; give one of pictures that every worker sees"
    assert refusal(tmp_path / "a") == expected
    (tmp_path / "a").write_text("a file")
    assert refusal(tmp_path / "a") == expected
    (tmp_path / "a").unlink()
    (tmp_path / "a").mkdir()
    assert refusal(tmp_path / "a").startswith(f"{where}: no picture in it or below; known are .bmp, .gif, .jpeg")
    save_pictures(tmp_path / "a", 1)
    assert refusal(tmp_path / "a") == f"{where}: 1 of 1 pictures can be decoded; give at least 2, better about 100"
    (tmp_path / "a/001.png").write_bytes(b"")
    assert refusal(tmp_path / "a").startswith(f"{where}: 1 of 2 pictures can be decoded: 001.png cannot be decoded (")


def test_more_pictures_than_a_worker_should_hold_are_refused(tmp_path, monkeypatch):
    save_pictures(tmp_path, 4)
    monkeypatch.setattr(picture_folder, "MOST_BYTES", 3 * 64)
    assert refusal(tmp_path) == (
        f"synthesis.statistics is '{tmp_path}', which has 4 pictures; each worker holds at most 3 of 8 pixels: give a "
        "folder with some of them"
    )


def test_channels_that_pictures_do_not_have_are_refused(tmp_path):
    save_pictures(tmp_path, 2)
    space = ImageSpace(channels=2, size=8, mean=(0.5, 0.5), std=(0.2, 0.2))
    assert refusal(tmp_path, space) == (
        "synthesis.statistics names pictures, which have 1, 3 or 4 channels, but teacher.image_space.channels is 2; "
        "drop synthesis.statistics"
    )


def test_picture_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    save_pictures(tmp_path, 2)
    read_bytes = Path.read_bytes

    def refusing(path):  # as chmod does, but for root
        if path.name == "001.png":
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refusing)
    assert refusal(tmp_path) == f"{tmp_path}/001.png cannot be read: Permission denied; let every worker read it"


def test_what_is_said_of_real_pictures_has_their_number_place_and_use(tmp_path):
    save_pictures(tmp_path / "a", 2)
    save_pictures(tmp_path / "b", 3)
    found = {"synthesis.start.images": read(tmp_path / "a"), "synthesis.statistics": read(tmp_path / "b")}
    assert not_data_free(found) == (
        f"synthesis starts from 2 real pictures in {tmp_path}/a and moments are compared with those of 3 real pictures "
        f"in {tmp_path}/b"
    )
    assert not_data_free({}) is None
