"""Pictures of a transfer set, with the teacher's confidence in them."""

from __future__ import annotations

import torch
from torch import Tensor

from raydfkd.report.page import Gallery
from raydfkd.runner.view import SetView

GALLERY_IMAGES = 12


def gallery(
    view: SetView, classes: tuple[int, ...], class_names: tuple[str, ...], *, images: int = GALLERY_IMAGES
) -> Gallery | None:
    """Images of each class, from different units as far as there are some; classes without any are left out.

    Of each unit the last images come first, which are those of the longest training. None where there is no image.
    """
    candidates: dict[int, list[list[tuple[Tensor, Tensor]]]] = {label: [] for label in classes}
    for rows in view.rows():
        probabilities = rows.teacher_logits.float().softmax(1)
        for label in candidates.keys() & set(rows.labels.tolist()):
            if len(candidates[label]) < images:
                places = (rows.labels == label).nonzero().flatten().flip(0)[:images].tolist()
                pictures = [(rows.images[place].clone(), probabilities[place, label]) for place in places]
                candidates[label].append(pictures)
        if all(sum(map(len, pieces)) >= images and len(pieces) >= images for pieces in candidates.values()):
            break
    found = {label: _in_turns(pieces, images) for label, pieces in candidates.items() if pieces}
    if not found:
        return None
    shortest = min(len(row) for row in found.values())
    return Gallery(
        images=torch.stack([torch.stack([image for image, _ in row[:shortest]]) for row in found.values()]),
        class_names=tuple(class_names[label] for label in found),
        teacher_confidence=torch.stack([torch.stack([sure for _, sure in row[:shortest]]) for row in found.values()]),
    )


def _in_turns(pieces: list[list[tuple[Tensor, Tensor]]], count: int) -> list[tuple[Tensor, Tensor]]:
    """Take one of each piece, then another of each, up to ``count``."""
    turns = [piece[turn] for turn in range(count) for piece in pieces if turn < len(piece)]
    return turns[:count]
