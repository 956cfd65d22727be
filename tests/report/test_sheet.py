from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from test_page import make_gallery

from raydfkd.report.sheet import CAPTION, GAP, gallery_sheet


def drawn(gallery, path):
    gallery_sheet(gallery, path)
    with Image.open(path) as sheet:
        return sheet.format, torch.from_numpy(np.array(sheet.convert("RGB"))).permute(2, 0, 1)


def test_sheet_has_a_row_for_each_class_and_keeps_the_pixels(tmp_path):
    gallery = make_gallery(2, 4)
    kind, sheet = drawn(gallery, tmp_path / "folder" / "gallery.png")
    assert kind == "PNG"
    assert sheet.shape[1:] == (2 * (2 * 8 + 2) + 2, 4 * (2 * 8 + 2) + 2)
    second_row_third_column = sheet[:, 20 : 20 + 16 : 2, 38 : 38 + 16 : 2]
    torch.testing.assert_close(second_row_third_column, gallery.images[1, 2].expand(3, -1, -1))


@pytest.mark.parametrize(("channels", "side"), [(1, 100), (3, 112), (5, 100)])
def test_few_pictures_of_a_class_stand_side_by_side_under_its_name(tmp_path, channels, side):
    gallery = make_gallery(7, 2, channels, side)
    kind, sheet = drawn(gallery, tmp_path / "gallery.png")
    assert sheet.shape[1:] == (2 * (side + CAPTION + GAP) - GAP, 5 * (2 * side + GAP) - GAP)
    left = 2 * side + GAP
    seen = sheet[:, :side, left + side : left + 2 * side]
    second = gallery.images[1, 1]
    expected = second if channels == 3 else second.float().mean(0, keepdim=True).round().byte().expand(3, -1, -1)
    torch.testing.assert_close(seen, expected)
    name = sheet[:, side : side + CAPTION, left : left + 2 * side]
    assert name.min() < 100, "something is written there"
    assert (sheet[:, side + CAPTION + GAP :, 2 * left : 5 * left] == 255).all(), "there are seven classes only"


def test_sheet_is_a_jpeg_where_its_name_ends_so(tmp_path):
    assert drawn(make_gallery(2, 1), tmp_path / "gallery.jpg")[0] == "JPEG"
