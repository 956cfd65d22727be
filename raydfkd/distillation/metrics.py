"""Figures of two networks' answers to the same images, counted batch by batch: memory does not grow with the images.

Counts are integers and sums double, so that a figure does not depend on the size of the batches.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOP5_FROM = 10
"""Classes from which on top-5 says something."""
WHOLE_UP_TO = 100
"""Classes up to which a confusion matrix is kept whole."""
MOST_CONFUSED = 50
"""Pairs of classes that are kept of a larger one."""
BINS = 15
"""Bins of confidence, equally wide, for the calibration error."""


class Comparison:
    """How often student and teacher agree and, where there are labels, how good each of them is.

    Args:
        classes: K, the width of their logits.
    """

    def __init__(self, classes: int) -> None:
        self._agreed = 0
        self.images = 0
        """Images that were counted."""
        self._teacher, self._student = Scores(classes), Scores(classes)

    def add(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> None:
        """Count a batch: logits [N, K] of both, and labels [N] from 0 to K - 1 if there are any."""
        self._agreed += int((student.argmax(1) == teacher.argmax(1)).sum())
        self.images += len(student)
        if labels is not None:
            self._student.add(student, labels)
            self._teacher.add(teacher, labels)

    @property
    def agreement(self) -> float:
        """Share of images to which both give the same class; NaN without images."""
        return self._agreed / self.images if self.images else float("nan")

    @property
    def teacher(self) -> Figures | None:
        """The teacher's figures; None without labels."""
        return self._teacher.figures()

    @property
    def student(self) -> Figures | None:
        """The student's figures; None without labels."""
        return self._student.figures()


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """How good a network is on labelled images, as plain data."""

    top1: float
    """Share of images whose largest logit is that of the label."""
    top5: float | None
    """Share of images whose label is among the five largest; None of fewer than ``TOP5_FROM`` classes."""
    ece: float
    """Expected calibration error of the softmax, 0 to 1: the mean gap between confidence and accuracy over ``BINS``
    equal bins (a, b] of confidence, weighted by their images (Guo et al. 2017)."""
    per_class: list[float | None]
    """Top-1 on the images of each class; None where there are none."""
    images_per_class: list[int]
    """Images of each class."""
    confusion: dict[str, Any]
    """``matrix`` [K][K], images of a class (row) that were given each class (column); of more than ``WHOLE_UP_TO``
    classes instead ``pairs``, the most frequent mistakes as [class, answer, images], at most ``MOST_CONFUSED``."""


class Scores:
    """Counts of one network's answers to labelled images."""

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._answers: Counter[int] = Counter()
        self._in_top5 = 0
        self._bins = torch.zeros(3, BINS, dtype=torch.float64)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits [N, K] and labels [N]."""
        sure, answers = logits.double().softmax(1).max(1)
        pairs, counts = (labels * self._classes + answers).unique(return_counts=True)
        self._answers.update(dict(zip(pairs.tolist(), counts.tolist(), strict=True)))
        if self._classes >= TOP5_FROM:
            self._in_top5 += int((logits.topk(5).indices == labels[:, None]).sum())
        bins = (sure * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
        rows = torch.stack([torch.ones_like(sure), sure, (answers == labels).double()])
        self._bins.index_add_(1, bins, rows)

    def figures(self) -> Figures | None:
        """What they come to; None where nothing was counted."""
        total = self._answers.total()
        if not total:
            return None
        images, right = [0] * self._classes, [0] * self._classes
        for pair, count in self._answers.items():
            label, answer = divmod(pair, self._classes)
            images[label] += count
            right[label] += count * (label == answer)
        _, confidence, hits = self._bins
        return Figures(
            top1=sum(right) / total,
            top5=self._in_top5 / total if self._classes >= TOP5_FROM else None,
            ece=float((confidence - hits).abs().sum()) / total,
            per_class=[hit / count if count else None for hit, count in zip(right, images, strict=True)],
            images_per_class=images,
            confusion=self._confusion(),
        )

    def _confusion(self) -> dict[str, Any]:
        if self._classes <= WHOLE_UP_TO:
            matrix = [
                [self._answers[label * self._classes + answer] for answer in range(self._classes)]
                for label in range(self._classes)
            ]
            return {"matrix": matrix}
        mistakes = [
            (*divmod(pair, self._classes), count)
            for pair, count in self._answers.items()
            if pair % (self._classes + 1)  # label and answer differ
        ]
        mistakes.sort(key=lambda mistake: (-mistake[2], mistake))
        return {"pairs": [list(mistake) for mistake in mistakes[:MOST_CONFUSED]]}
