"""Pictures of a transfer set, with the teacher's confidence in them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from raydfkd.data.commits import Commit
from raydfkd.data.shards import StoredRows
from raydfkd.report.page import MAX_CLASSES, Gallery, Origin, evenly_spaced
from raydfkd.runner.view import SetView

GALLERY_IMAGES = 12
MAX_READS = 120
"""Parts that are read at most: of large images 4 GiB, where a set may have terabytes."""


class _Picture(NamedTuple):
    image: Tensor
    """[C, H, W]."""
    confidence: float
    """The teacher's, in its class; NaN where there is no picture."""
    origin: Origin | None


def gallery(
    view: SetView, classes: tuple[int, ...], class_names: tuple[str, ...], *, images: int = GALLERY_IMAGES
) -> Gallery | None:
    """Images of each class, from different units as far as there are some; classes without any are left out.

    Of each unit the last images come first, which are those of the longest training. A class with fewer images than
    others has gaps. Of more than ``MAX_CLASSES`` classes some are shown, evenly spaced. None where there is no image.

    No part is read twice, and none whose unit, by its plan, has no class that wants more. Reading ends with the first
    round over the units that brings nothing new, or after ``MAX_READS`` parts.
    """
    found = {classes[index]: _Pictures(images) for index in evenly_spaced(len(classes), MAX_CLASSES)}
    num_reads = 0
    for number in range(view.max_parts):
        wanting = [label for label in found if found[label].wants_more(number)]
        is_news = False
        for commit in view.snapshot.commits:
            if not wanting or num_reads >= MAX_READS:
                break
            made_for = view.classes_of(commit.unit)
            labels = wanting if made_for is None else [label for label in wanting if label in made_for]
            if not labels or number >= len(commit.parts):
                continue
            num_reads += 1
            rows = view.read(commit, number)
            if rows is not None:
                is_news |= any([found[label].take(rows, label, commit, number) for label in labels])
                wanting = [label for label in wanting if found[label].wants_more(number)]
        if not is_news:
            break
    rows_found = {label: pictures.chosen for label, pictures in found.items() if pictures.chosen}
    if not rows_found:
        return None
    blank = _Picture(torch.full_like(next(iter(rows_found.values()))[0].image, 255), float("nan"), None)
    columns = max(map(len, rows_found.values()))
    filled = [[*row, *[blank] * (columns - len(row))] for row in rows_found.values()]
    return Gallery(
        images=torch.stack([torch.stack([picture.image for picture in row]) for row in filled]),
        class_names=tuple(class_names[label] for label in rows_found),
        classes=tuple(rows_found),
        teacher_confidence=torch.tensor([[picture.confidence for picture in row] for row in filled]),
        origins=tuple(tuple(picture.origin for picture in row) for row in filled),
        of_classes=len(classes),
    )


class _Pictures:
    """The pictures of one class: those that are shown of what was read so far, and no others."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._pieces: list[list[_Picture]] = []

    def wants_more(self, number: int) -> bool:
        """Whether to look into another part: a first one for the sake of another unit, a later one for want of any."""
        return (len(self._pieces) if number == 0 else len(self.chosen)) < self._count

    def take(self, rows: StoredRows, label: int, commit: Commit, number: int) -> bool:
        """Choose among the images of another part of a unit too; returns whether it has any of the class."""
        places = (rows.labels == label).nonzero().flatten().flip(0)[: self._count].tolist()
        confidences = rows.teacher_logits[places].float().softmax(1)[:, label].tolist()
        first = sum(part.rows for part in commit.parts[:number])
        origins = [Origin(unit=commit.unit, seed=commit.seed, index=first + place) for place in places]
        if places:
            images = [rows.images[place].clone() for place in places]
            self._pieces.append(list(map(_Picture, images, confidences, origins)))
        while len(self.chosen) > self._count:
            max(reversed(self._pieces), key=len).pop()
        return bool(places)

    @property
    def chosen(self) -> list[_Picture]:
        """One picture of each part, then another of each, and so on."""
        return [piece[turn] for turn in range(self._count) for piece in self._pieces if turn < len(piece)]
