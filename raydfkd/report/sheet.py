"""The pictures of a gallery as one file, for a README or a slide."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from raydfkd.report.page import Gallery, picture, showable

FEW = 3
"""Pictures of each class up to which the classes stand side by side, with their names."""
COLUMNS = 5
"""Classes side by side."""
SMALL = 96
"""Edge in pixels up to which each one is shown as a square of four."""
CAPTION = 18
"""Height in pixels of the line with a name."""
GAP = 4


def gallery_sheet(gallery: Gallery, path: Path) -> None:
    """Write all images to ``path``, a JPEG where it ends so and else a PNG.

    A row for each class; of few pictures a class the classes stand side by side, each under its first name.
    """
    images = showable(gallery.images)
    if max(images.shape[-2:]) <= SMALL:
        images = images.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
    is_named = images.shape[1] <= FEW
    sheet = _named(images, gallery.class_names) if is_named else picture(_grid(images.flatten(0, 1), images.shape[1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG"
    sheet.save(path, kind, quality=88, optimize=True)  # PNG ignores the quality


def _grid(images: Tensor, columns: int) -> Tensor:
    from torchvision.utils import make_grid  # a second and a half, which `raydfkd check` is spared

    grid: Tensor = make_grid(images, nrow=columns, padding=2, pad_value=255)
    return grid


def _named(images: Tensor, names: tuple[str, ...]) -> Image.Image:
    """Images [K, M, C, H, W] with the M of each class above its name."""
    count, each, channels, height, width = images.shape
    cell = each * width, height + CAPTION
    columns = min(COLUMNS, count)
    size = columns * (cell[0] + GAP) - GAP, -(-count // columns) * (cell[1] + GAP) - GAP
    sheet = Image.new("L" if channels == 1 else "RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for place, (row, name) in enumerate(zip(images, names, strict=True)):
        down, right = divmod(place, columns)
        left, top = right * (cell[0] + GAP), down * (cell[1] + GAP)
        sheet.paste(picture(torch.cat(row.unbind(), dim=-1)), (left, top))
        draw.text((left + cell[0] / 2, top + height + 2), name.partition(",")[0], "black", font, anchor="ma")
    return sheet
