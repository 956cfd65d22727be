"""Small data sets that a system has on its disk: digits, fashion_mnist; a split of them is held in memory."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from raydfkd.config.schema import ImageSpace
from raydfkd.errors import RecipeError
from raydfkd.images.real_data import REAL_DATA, LabelledImages, RealData, Split, resized


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
