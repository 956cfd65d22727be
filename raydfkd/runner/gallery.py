"""Pictures of a transfer set, with what the teacher thinks of them."""

from __future__ import annotations

import torch
from torch import Tensor

from raydfkd.job import Job
from raydfkd.report.page import Gallery
from raydfkd.store.errors import DamagedError

GALLERY_IMAGES = 12


def gallery(job: Job, class_names: tuple[str, ...], *, images: int = GALLERY_IMAGES) -> Gallery | None:
    """Images of each class of the plan, from different units as far as there are some; None while a class has none."""
    found: dict[int, list[Tensor]] = {label: [] for label in job.recipe.classes}
    sure: dict[int, list[Tensor]] = {label: [] for label in job.recipe.classes}
    for turn in range(images):
        for commit in job.snapshot().commits:
            if all(len(row) >= images for row in found.values()):
                break
            try:
                rows = job.transfer_set.read(commit.parts[0])
            except DamagedError as damage:
                job.transfer_set.mark_damaged(commit, damage)
                continue
            probabilities = rows.teacher_logits.float().softmax(1)
            for label in found.keys() & set(rows.labels.tolist()):
                places = (rows.labels == label).nonzero().flatten()
                if len(found[label]) < images and turn < len(places):
                    place = places[-1 - turn]  # a unit's last images are those of the longest training
                    found[label].append(rows.images[place])
                    sure[label].append(probabilities[place, label])
    shortest = min(len(row) for row in found.values())
    if not shortest:
        return None
    return Gallery(
        images=torch.stack([torch.stack(row[:shortest]) for row in found.values()]),
        class_names=tuple(class_names[label] for label in found),
        teacher_confidence=torch.stack([torch.stack(row[:shortest]) for row in sure.values()]),
    )
