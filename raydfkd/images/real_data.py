"""Real images, for training teachers and judging students only; synthesis and distillation never import this.

A data set of one's own is a function, named in a recipe as ``real_data: {kind: "mypkg:birds", root: /data/birds}``.
It gets the teacher's image space and, as keyword-only arguments, the recipe's options, and returns a ``RealData``::

    def birds(space: ImageSpace, *, root: str) -> RealData:
        def load(split: Split) -> LabelledImages:
            images, labels = read(root, split)  # float [N, C, H, W] in [0, 1] of any size, int64 [N]
            return LabelledImages(images=resized(images, space), labels=labels)

        return RealData(class_names=("crow", "jay"), channels=3, load=load)

It is called before any work begins, so that is the place to find missing files (``RecipeError``); ``load`` is called
when a split is needed, and what it returns is checked.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from raydfkd.config.registry import Registry
from raydfkd.config.schema import ImageSpace, PluginSpec
from raydfkd.errors import RecipeError

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledImages:
    """A split of a data set."""

    images: Tensor
    """[N, C, H, W], uint8, of the size of the teacher's image space."""
    labels: Tensor
    """[N], int64, from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RealData:
    """A data set that can be read split by split."""

    class_names: tuple[str, ...]
    """One name a class of the teacher, in the order of the labels."""
    channels: int
    """Of its images."""
    load: Callable[[Split], LabelledImages]
    """Reads a split: `train` teaches a teacher, `validation` and `test` judge."""


REAL_DATA: Registry[RealData] = Registry("real data set", [], member="load")


def open_real_data(spec: PluginSpec, space: ImageSpace, classes: int) -> RealData:
    """Check that the data set is there and fits; nothing is read yet beyond what that takes.

    Raises:
        RecipeError: unknown kind, missing files, other channels or class count than the teacher's.
    """
    data = REAL_DATA.build(spec.kind, spec.options, space, where="real_data")
    if len(data.class_names) != classes:
        raise RecipeError(f"teacher.classes is {classes}, but {spec.kind} has {len(data.class_names)} classes")
    if data.channels != space.channels:
        raise RecipeError(
            f"teacher.image_space.channels is {space.channels}, but {spec.kind} has {data.channels}; use that"
        )
    return replace(data, load=lambda split: _checked(data.load(split), f"{spec.kind}, split {split}", space, classes))


def _checked(data: LabelledImages, name: str, space: ImageSpace, classes: int) -> LabelledImages:
    images, labels = data.images, data.labels
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
    return data


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


@REAL_DATA.register("digits")
def digits(space: ImageSpace) -> RealData:
    """The 1,797 handwritten digits of 8x8 pixels inside scikit-learn: 1,077 train, 180 validation, 540 test.

    The split is stratified and always the same.
    """

    def load(split: Split) -> LabelledImages:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        data = load_digits()
        rest, test = train_test_split(np.arange(1797), test_size=540, stratify=data.target, random_state=0)
        train, validation = train_test_split(rest, test_size=180, stratify=data.target[rest], random_state=0)
        rows = {"train": train, "validation": validation, "test": test}[split]
        images = torch.from_numpy(data.images[rows]).float()[:, None] / 16
        return LabelledImages(images=resized(images, space), labels=torch.from_numpy(data.target[rows]).long())

    return RealData(class_names=tuple("0123456789"), channels=1, load=load)


_FASHION_CLASSES = (
    *("T-shirt", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


@REAL_DATA.register("fashion_mnist")
def fashion_mnist(
    space: ImageSpace, *, root: str = "/usr/share/datasets/fashion-mnist", download: bool = False
) -> RealData:
    """Zalando's 70,000 garments of 28x28 pixels: 55,000 train, the last 5,000 of training validation, 10,000 test.

    Read from the four idx files, gzipped or not, in ``root`` or below; Debian's package dataset-fashion-mnist
    installs them, and with ``download`` torchvision fetches them into ``root``.

    Args:
        root: folder of the idx files.
        download: fetch them where they are missing.
    """
    if download and not _idx_file(root, "t10k-labels"):
        from torchvision.datasets import FashionMNIST

        FashionMNIST(root, download=True)
    for name in ("train-images", "train-labels", "t10k-images", "t10k-labels"):
        if _idx_file(root, name) is None:
            raise RecipeError(
                f"real_data.root is {root!r}: no {name} idx file there; apt-get install dataset-fashion-mnist, "
                "or set real_data.download=true"
            )

    def load(split: Split) -> LabelledImages:
        stem = "t10k" if split == "test" else "train"
        images = _read_idx(root, f"{stem}-images").unsqueeze(1).float() / 255
        labels = _read_idx(root, f"{stem}-labels").long()
        rows = {"train": slice(0, 55_000), "validation": slice(55_000, None), "test": slice(None)}[split]
        return LabelledImages(images=resized(images[rows], space), labels=labels[rows])

    return RealData(class_names=_FASHION_CLASSES, channels=1, load=load)


def _idx_file(root: str, name: str) -> Path | None:
    return next((path for path in sorted(Path(root).rglob(f"{name}*")) if path.is_file()), None)


def _read_idx(root: str, name: str) -> Tensor:
    path = _idx_file(root, name)
    assert path is not None, "presence was checked when the data set was opened"
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if content[:3] != b"\0\0\x08":
            raise ValueError("it does not begin like one")
        shape = np.frombuffer(content, ">u4", count=content[3], offset=4).astype(int).tolist()
        pixels = np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])
        return torch.from_numpy(pixels.reshape(shape).copy())
    except (ValueError, IndexError, EOFError, OSError, zlib.error) as error:
        raise RecipeError(f"real_data.root: {path} is not an idx file of bytes ({error}); fetch it again") from None
