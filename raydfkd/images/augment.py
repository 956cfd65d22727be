"""Augmentations, the same for synthesis, teachers and students: a network sees these images instead of the bare ones.

Random numbers come from the CPU generator that is passed in, so a seed means the same on every device.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from raydfkd.config.registry import Registry
from raydfkd.config.schema import BelowOne, Count, Fraction, NotNegative, PluginSpec, PositiveFloat
from raydfkd.errors import RecipeError


class Augmentation(Protocol):
    """Maps images [N, C, H, W] in nominal units (``images.pixels``) to images of the same shape, differentiably.

    One whose images are of several classes at once says so by ``mixes_images = True`` on its class; it is refused where
    something reads the label of an image.

    One that takes a keyword ``progress`` is told what share of the steps is made, from 0 to 1, in the optimisation of
    images or the training of a network: a curriculum.
    """

    def __call__(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Augment a batch."""


AUGMENTATIONS: Registry[Augmentation] = Registry("augmentation", [])


@AUGMENTATIONS.register("jitter")
class Jitter(Augmentation):
    """Roll the whole batch by one random offset (Yin et al. 2020).

    Args:
        pixels: largest offset along each axis.
    """

    def __init__(self, *, pixels: Count) -> None:
        self._pixels = pixels

    @override
    def __call__(self, images: Tensor, rng: torch.Generator) -> Tensor:
        offsets = torch.randint(-self._pixels, self._pixels + 1, (2,), generator=rng).tolist()
        return images.roll(offsets, (2, 3))


@AUGMENTATIONS.register("flip")
class Flip(Augmentation):
    """Mirror the whole batch left to right (Yin et al. 2020).

    Args:
        probability: of mirroring.
    """

    def __init__(self, *, probability: Fraction = 0.5) -> None:
        self._probability = probability

    @override
    def __call__(self, images: Tensor, rng: torch.Generator) -> Tensor:
        return images.flip(3) if torch.rand((), generator=rng).item() < self._probability else images


@AUGMENTATIONS.register("affine")
class Affine(Augmentation):
    """Rotate, scale and shift each image by itself; the border is continued outwards.

    Args:
        degrees: largest rotation to either side.
        scale: largest relative change of size.
        shift: largest shift along each axis, as a share of the image.
    """

    def __init__(self, *, degrees: NotNegative = 0.0, scale: BelowOne = 0.0, shift: Fraction = 0.0) -> None:
        self._radians = math.radians(degrees)
        self._scale = scale
        self._shift = shift

    @override
    def __call__(self, images: Tensor, rng: torch.Generator) -> Tensor:
        angle, zoom, dx, dy = torch.rand(4, len(images), generator=rng).mul(2).sub(1)
        angle, zoom = angle * self._radians, 1 + zoom * self._scale
        cos, sin = zoom * angle.cos(), zoom * angle.sin()
        tall = images.shape[2] / images.shape[3]  # coordinates go from -1 to 1 along both axes, however long these are
        rows = [
            torch.stack([cos, -sin * tall, dx * self._shift * 2], 1),
            torch.stack([sin / tall, cos, dy * self._shift * 2], 1),
        ]
        grid = F.affine_grid(torch.stack(rows, 1).to(images.device), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@AUGMENTATIONS.register("noise")
class Noise(Augmentation):
    """Add Gaussian noise, its strength drawn for each image between none and ``std``.

    Args:
        std: largest standard deviation, in nominal units (0.225 of the range from black to white).
    """

    def __init__(self, *, std: NotNegative) -> None:
        self._std = std

    @override
    def __call__(self, images: Tensor, rng: torch.Generator) -> Tensor:
        strength = torch.rand(len(images), 1, 1, 1, generator=rng) * self._std
        noise = torch.randn(images.shape, generator=rng)
        return images + (strength * noise).to(images.device)


@AUGMENTATIONS.register("mixup")
class Mixup(Augmentation):
    """Blend each image with another one of the batch; only where nothing reads the label of an image.

    Args:
        alpha: both parameters of the Beta distribution of the share.
    """

    mixes_images: ClassVar[bool] = True

    def __init__(self, *, alpha: PositiveFloat = 1.0) -> None:
        self._alpha = alpha

    @override
    def __call__(self, images: Tensor, rng: torch.Generator) -> Tensor:
        shape = torch.full((2, len(images)), self._alpha)
        first, second = torch._standard_gamma(shape, generator=rng)
        share = (first / (first + second)).view(-1, 1, 1, 1).to(images.device)
        partner = torch.randperm(len(images), generator=rng).to(images.device)
        mixed: Tensor = share * images + (1 - share) * images[partner]
        return mixed


class Chain:
    """Augmentations one after another."""

    def __init__(self, augmentations: Sequence[Augmentation]) -> None:
        self._augmentations = [(augmentation, takes_progress(augmentation)) for augmentation in augmentations]

    def __call__(self, images: Tensor, rng: torch.Generator, *, progress: float = 1.0) -> Tensor:
        """Apply all of them in order, ``progress`` being the share of the steps that are made."""
        for augmentation, is_told in self._augmentations:
            images = augmentation(images, rng, **{"progress": progress} if is_told else {})
        return images


def takes_progress(augmentation: Augmentation) -> bool:
    """Whether an augmentation is told how far the steps are."""
    return "progress" in inspect.signature(getattr(augmentation, "forward", augmentation)).parameters


def build_augmentations(specs: Sequence[PluginSpec], *, where: str, label_reader: str | None = None) -> Chain:
    """Build a recipe's list of augmentations; ``label_reader`` is what reads the labels of their images, if anything.

    Raises:
        RecipeError: unknown name or option, or images are mixed whose labels something reads.
    """
    augmentations = []
    for index, spec in enumerate(specs):
        key = f"{where}[{index}]"
        augmentations.append(AUGMENTATIONS.build(spec.kind, spec.options, where=key))
        _refuse_of_another_kind(augmentations[-1], spec.kind, key)
        if label_reader is not None and getattr(augmentations[-1], "mixes_images", False):
            raise RecipeError(
                f"{key}: {spec.kind} mixes images, but {label_reader} takes each to be of one class; drop one of them"
            )
    return Chain(augmentations)


def _refuse_of_another_kind(augmentation: Augmentation, name: str, where: str) -> None:
    told = {"progress": 0.0} if takes_progress(augmentation) else {}
    try:
        inspect.signature(getattr(augmentation, "forward", augmentation)).bind(None, None, **told)
    except TypeError as error:
        raise RecipeError(
            f"{where}: {name} cannot be called with images and a generator of random numbers ({error}), so it is no "
            "augmentation"
        ) from None
