"""Real images, for training teachers and judging students only; synthesis and distillation never import this.

A data set of one's own is a function, named in a recipe as ``real_data: {kind: "mypkg:birds", root: /data/birds}``.
It gets the teacher's image space and, as keyword-only arguments, the recipe's options, and returns a ``RealData``::

    def birds(space: ImageSpace, *, root: str) -> RealData:
        def load(split: Split) -> LabelledImages:
            images, labels = read(root, split)  # float [N, C, H, W] in [0, 1] of any size, int64 [N]
            return LabelledImages(images=resized(images, space), labels=labels)

        return RealData(class_names=("crow", "jay"), channels=3, load=load)

It is called before any work begins, so that is the place to find missing files (``RecipeError``); ``load`` is called
when a split is needed, and what it returns is checked. A split that does not fit into memory is any object with the
method of ``LabelledBatches``; ``images.streams.PictureStream`` is one that decodes pictures ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from raydfkd.config.registry import Registry
from raydfkd.config.schema import ImageSpace, PluginSpec
from raydfkd.errors import RecipeError
from raydfkd.images.classes import Matching, match_classes

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Batch = tuple[Tensor, Tensor]
"""Images uint8 [n, C, H, W] of the teacher's size, and their labels int64 [n]."""
OnBroken = Callable[[str], None]
"""Receives the name of a picture that cannot be decoded and is left out."""


def ignore(_: str) -> None:
    """Be told of a broken picture, and do nothing."""


class LabelledBatches(Protocol):
    """A split of a data set that is read while one goes through it, as often as one likes."""

    def batches(self, size: int, on_broken: OnBroken = ignore) -> Iterator[Batch]:
        """Yield ``size`` images at a time, fewer at the end, always in the same order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledImages:
    """A split of a data set in memory."""

    images: Tensor
    """[N, C, H, W], uint8, of the size of the teacher's image space."""
    labels: Tensor
    """[N], int64, from 0."""

    def batches(self, size: int, on_broken: OnBroken = ignore) -> Iterator[Batch]:
        """Yield ``size`` images at a time; none of them is broken."""
        yield from zip(self.images.split(size), self.labels.split(size), strict=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class RealData:
    """A data set that can be read split by split."""

    class_names: tuple[str, ...]
    """A name for each label, in their order."""
    channels: int
    """Of its images."""
    load: Callable[[Split], LabelledImages | LabelledBatches]
    """Opens a split: `train` teaches a teacher, `validation` and `test` judge."""
    splits: tuple[Split, ...] = SPLITS
    """Those that there are."""
    matching: Matching | None = None
    """How its classes are found among the teacher's; None where they are the same, in the same order."""
    notes: tuple[str, ...] = ()
    """Things that the user should know of it, a line each."""


REAL_DATA: Registry[RealData] = Registry(
    "real data set",
    [f"raydfkd.images.{name}" for name in ("packaged_data", "folders", "torchvision_data", "parquet", "huggingface")],
    member="load",
)


def open_real_data(
    spec: PluginSpec, space: ImageSpace, classes: int, class_names: tuple[str, ...] | None = None
) -> RealData:
    """Check that the data set is there and fits; nothing is read yet beyond what that takes.

    Its labels become the numbers of the teacher's classes, and its class names have one for each of these.

    Args:
        spec: kind and options.
        space: the teacher's.
        classes: number of the teacher's.
        class_names: theirs; None where nobody knows them.

    Raises:
        RecipeError: unknown kind, missing files, other channels or class count than the teacher's, a class that the
            teacher does not have.
    """
    data = REAL_DATA.build(spec.kind, spec.options, space, where="real_data")
    if data.channels != space.channels:
        raise RecipeError(
            f"teacher.image_space.channels is {space.channels}, but {spec.kind} has {data.channels}; use that"
        )
    labels, names, notes = tuple(range(classes)), class_names or data.class_names, data.notes
    if data.matching is not None:
        matched = match_classes(data.class_names, data.matching, classes=classes, teacher_names=class_names)
        labels, names, notes = matched.labels, matched.names, (*notes, *matched.notes)
    elif len(data.class_names) != classes:
        raise RecipeError(f"teacher.classes is {classes}, but {spec.kind} has {len(data.class_names)} classes")

    def load(split: Split) -> LabelledImages | LabelledBatches:
        if split not in data.splits:
            raise RecipeError(f"real_data: {spec.kind} has no {split} images here, only {' and '.join(data.splits)}")
        name = f"{spec.kind}, split {split}"
        found = data.load(split)
        if isinstance(found, LabelledImages):
            _check(found.images, found.labels, name, space, len(labels))
            return replace(found, labels=torch.tensor(labels)[found.labels])
        return _Checked(found, name, space, labels)

    if data.matching is not None or REAL_DATA.is_own(spec.kind):  # else a mistake would be found after all the work
        next(load("test" if "test" in data.splits else data.splits[-1]).batches(1))
    return replace(data, class_names=names, notes=notes, load=load)


def in_memory(data: LabelledImages | LabelledBatches, on_broken: OnBroken = ignore) -> LabelledImages:
    """A split as a whole, at the teacher's size, for a training that draws from it at random."""
    if isinstance(data, LabelledImages):
        return data
    images, labels = zip(*data.batches(256, on_broken), strict=True)
    return LabelledImages(images=torch.cat(images), labels=torch.cat(labels))


def some_of(data: LabelledImages | LabelledBatches, most: int) -> LabelledImages:
    """At most ``most`` images of a split, in memory: evenly spaced ones, or the first of a split of somebody's own.

    Broken pictures are left out.
    """
    if isinstance(data, LabelledImages):
        rows = torch.linspace(0, len(data.labels) - 1, min(most, len(data.labels))).round().long()
        return LabelledImages(images=data.images[rows], labels=data.labels[rows])
    images, labels = zip(*_first(data.thinned(most) if isinstance(data, _Checked) else data, most), strict=True)
    return LabelledImages(images=torch.cat(images), labels=torch.cat(labels))


def _first(data: LabelledBatches, most: int) -> Iterator[Batch]:
    for images, labels in data.batches(min(most, 256)):
        yield images[:most], labels[:most]
        most -= len(labels)
        if most <= 0:
            return


class _Checked:
    """A split whose batches are checked as they come, and whose labels become those of the teacher."""

    def __init__(self, data: LabelledBatches, name: str, space: ImageSpace, labels: tuple[int, ...]) -> None:
        self._data, self._name, self._space = data, name, space
        self._labels = torch.tensor(labels)

    def thinned(self, most: int) -> LabelledBatches:
        """The split with fewer pictures, where it can be had without decoding the others; else as it is."""
        thinned = getattr(self._data, "thinned", None)
        if thinned is None:
            return self
        return _Checked(thinned(most), self._name, self._space, tuple(self._labels.tolist()))

    def batches(self, size: int, on_broken: OnBroken = ignore) -> Iterator[Batch]:
        is_empty = True
        for images, labels in self._data.batches(size, on_broken):
            _check(images, labels, self._name, self._space, len(self._labels))
            is_empty = False
            yield images, self._labels[labels]
        if is_empty:
            raise RecipeError(f"real_data: {self._name} has no picture that can be read")


def _check(images: Tensor, labels: Tensor, name: str, space: ImageSpace, classes: int) -> None:
    shape = (len(labels), *space.shape)
    if images.dtype != torch.uint8 or tuple(images.shape) != shape:
        raise RecipeError(
            f"real_data: {name} has images of {images.dtype} {list(images.shape)}; give torch.uint8 {list(shape)}"
        )
    if labels.dtype != torch.int64 or labels.ndim != 1 or not len(labels):
        raise RecipeError(f"real_data: {name} has labels of {labels.dtype} {list(labels.shape)}; give torch.int64 [N]")
    if labels.min() < 0 or labels.max() >= classes:
        raise RecipeError(
            f"real_data: {name} has labels from {labels.min()} to {labels.max()}; give 0 to {classes - 1}, the "
            "position in class_names"
        )


def resized(images: Tensor, space: ImageSpace) -> Tensor:
    """Float images in [0, 1] to uint8 of the ``space``'s size: scaled bilinearly, or padded by less than a fifth.

    Where height and width are not in the proportion of the images', these are stretched.
    """
    height, width = space.height, space.width
    missing = height - images.shape[-2]
    is_border = missing == width - images.shape[-1] and missing % 2 == 0
    if is_border and 0 < missing <= min(height, width) // 5:
        images = F.pad(images, [missing // 2] * 4)
    elif images.shape[-2:] != (height, width):
        images = F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False, antialias=True)
    return images.mul(255).round().clamp(0, 255).to(torch.uint8)
