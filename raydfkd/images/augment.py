"""Augmentations, the same for synthesis, teachers and students: a network sees these images instead of the bare ones.

Random numbers come from the CPU generator that is passed in, so a seed means the same on every device.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from raydfkd.config.registry import Registry
from raydfkd.config.schema import BelowOne, Count, Fraction, NotNegative, PluginSpec, PositiveFloat
from raydfkd.errors import RecipeError
from raydfkd.images.pixels import BLACK


class Augmentation(Protocol):
    """Maps images [N, C, H, W] in nominal units (``images.pixels``) to images of the same shape, differentiably.

    One whose images are of several classes at once says so by ``mixes_images = True`` on its class. Where something
    reads labels it is refused, unless it can tell what it has mixed and labels can be mixed too, see ``Mixing``.

    One that takes a keyword ``progress`` is told what share of the steps is made, from 0 to 1, in the optimisation of
    images or the training of a network: a curriculum.
    """

    def __call__(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Augment a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Which images of a batch of N were mixed, each with one other."""

    partner: Tensor
    """Number [N] of the other image."""
    share: Tensor
    """Share [N] of the image itself, from 0 to 1; the rest is its partner's."""

    def of(self, labels: Tensor, classes: int) -> Tensor:
        """Shares [N, classes] of the classes in the mixed images, of labels [N] or such shares of the images before."""
        shares = F.one_hot(labels, classes).to(self.share) if labels.ndim == 1 else labels
        return torch.lerp(shares[self.partner], shares, self.share[:, None])


class Mixing(Augmentation, Protocol):
    """An augmentation that mixes images and can tell which, so that labels are mixed with them."""

    mixes_images: ClassVar[bool] = True

    @override
    def __call__(self, images: Tensor, rng: torch.Generator) -> Tensor:
        return self.mix(images, rng)[0]

    def mix(self, images: Tensor, rng: torch.Generator) -> tuple[Tensor, Mixture]:
        """Mix a batch."""
        raise NotImplementedError


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


@AUGMENTATIONS.register("color_jitter")
class ColorJitter(Augmentation):
    """Change brightness and contrast of each image by itself; nothing is clipped, so gradients reach every pixel.

    Brightness multiplies the light, so that black stays black; contrast moves pixels away from the image's mean.

    Args:
        brightness: largest relative change of brightness.
        contrast: largest relative change of contrast.
    """

    def __init__(self, *, brightness: BelowOne = 0.0, contrast: BelowOne = 0.0) -> None:
        self._brightness, self._contrast = brightness, contrast

    @override
    def __call__(self, images: Tensor, rng: torch.Generator) -> Tensor:
        swing = torch.rand(2, len(images), 1, 1, 1, generator=rng).mul(2).sub(1).to(images.device)
        bright = BLACK + (images - BLACK) * (1 + swing[0] * self._brightness)
        mean = bright.mean((1, 2, 3), keepdim=True)
        changed: Tensor = mean + (bright - mean) * (1 + swing[1] * self._contrast)
        return changed


@AUGMENTATIONS.register("crop")
class Crop(Augmentation):
    """Shift each image by a whole number of pixels along both axes, as padding and then cropping at random does.

    Args:
        pixels: largest shift, the width of the padding.
        padding: what comes in at the border: the image reflected, its last row or column continued, or black.
    """

    def __init__(self, *, pixels: Count, padding: Literal["reflect", "border", "black"] = "reflect") -> None:
        self._pixels, self._padding = pixels, padding

    @override
    def __call__(self, images: Tensor, rng: torch.Generator) -> Tensor:
        count, channels, height, width = images.shape
        shift = torch.randint(-self._pixels, self._pixels + 1, (2, count, 1), generator=rng)
        rows, columns = (torch.arange(size) + by for size, by in zip((height, width), shift, strict=True))
        at = (self._inside(rows, height)[:, None, :, None], self._inside(columns, width)[:, None, None])
        numbers = torch.arange(count).view(-1, 1, 1, 1), torch.arange(channels).view(1, -1, 1, 1)
        seen: Tensor = images[tuple(index.to(images.device) for index in (*numbers, *at))]
        if self._padding != "black":
            return seen
        beside = (((rows < 0) | (rows >= height))[:, :, None] | ((columns < 0) | (columns >= width))[:, None])[:, None]
        return seen.masked_fill(beside.to(images.device), BLACK)

    def _inside(self, places: Tensor, size: int) -> Tensor:
        if self._padding == "reflect" and size > 1:
            period = 2 * (size - 1)
            folded = places.remainder(period)
            return torch.minimum(folded, period - folded)
        return places.clamp(0, size - 1)


@AUGMENTATIONS.register("random_resized_crop")
class RandomResizedCrop(Augmentation):
    """Cut a rectangle out of each image and stretch it to the size of the image, bilinearly.

    Its area is drawn between two shares of the image's, the logarithm of its aspect ratio between those of two numbers;
    a side that would be longer than the image's is as long. Unlike torchvision's, a rectangle need not begin and end
    with a pixel. The lower share may fall over the steps, so that nearly whole images come first and small crops last:
    a curriculum (Yin & Shen 2024, CDA: `cosine`). SRe2L (Yin et al. 2023) draws one rectangle for the whole batch.

    Args:
        scale: least and largest share of the area.
        ratio: least and largest ratio of width to height.
        per_batch: draw one rectangle for the whole batch.
        schedule: of the least share: constant, or from scale_from to that of `scale` on a half cosine, a line or at
            once.
        scale_from: least share at the first step, where there is a schedule.
        milestone: share of the steps at which the least share has become that of `scale`.
    """

    def __init__(  # noqa: PLR0913 - options of a recipe, by name
        self,
        *,
        scale: tuple[PositiveFloat, Fraction] = (0.08, 1.0),
        ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3),
        per_batch: bool = False,
        schedule: Literal["constant", "cosine", "linear", "step"] = "constant",
        scale_from: Fraction = 1.0,
        milestone: PositiveFloat = 1.0,
    ) -> None:
        for name, (low, high) in (("scale", scale), ("ratio", ratio)):
            if low > high:
                raise ValueError(f"{name} is [{low:g}, {high:g}]; give the smaller number first")
        if milestone > 1:
            raise ValueError(
                f"milestone is {milestone:g} of the steps, but a curriculum cannot be longer than these; use at most 1"
            )
        if schedule != "constant" and not scale[0] <= scale_from <= scale[1]:
            raise ValueError(f"scale_from is {scale_from:g}, which is not in scale, [{scale[0]:g}, {scale[1]:g}]")
        self._scale, self._ratio, self._per_batch = scale, ratio, per_batch
        self._schedule, self._scale_from, self._milestone = schedule, scale_from, milestone

    def least_scale(self, progress: float) -> float:
        """Least share of the area once the share ``progress`` of the steps is made."""
        done = min(1.0, progress / self._milestone)
        left = {
            "constant": 0.0,
            "linear": 1 - done,
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
            "step": float(done < 1),
        }[self._schedule]
        return self._scale[0] + (self._scale_from - self._scale[0]) * left

    @override
    def __call__(self, images: Tensor, rng: torch.Generator, *, progress: float = 1.0) -> Tensor:
        height, width = images.shape[2:]
        area, ratio, x, y = torch.rand(4, 1 if self._per_batch else len(images), generator=rng)
        least, most = self.least_scale(progress), self._scale[1]
        area = least + area * (most - least)
        low, high = math.log(self._ratio[0]), math.log(self._ratio[1])
        ratio = (low + ratio * (high - low)).exp() * height / width  # of the shares of width and height
        across, down = (area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1)
        zero = torch.zeros_like(across)
        rows = [  # coordinates go from -1 to 1 along both axes
            torch.stack([across, zero, (2 * x - 1) * (1 - across)], 1),
            torch.stack([zero, down, (2 * y - 1) * (1 - down)], 1),
        ]
        theta = torch.stack(rows, 1).expand(len(images), -1, -1)
        grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@AUGMENTATIONS.register("mixup")
class Mixup(Mixing):
    """Blend each image with another one of the batch, and its label where one is read (Zhang et al. 2018).

    Args:
        alpha: both parameters of the Beta distribution of the share, which is drawn for each image.
    """

    def __init__(self, *, alpha: PositiveFloat = 1.0) -> None:
        self._alpha = alpha

    @override
    def mix(self, images: Tensor, rng: torch.Generator) -> tuple[Tensor, Mixture]:
        share = _beta(self._alpha, len(images), rng).to(images.device)
        partner = torch.randperm(len(images), generator=rng).to(images.device)
        own = share.view(-1, 1, 1, 1)
        return own * images + (1 - own) * images[partner], Mixture(partner=partner, share=share)


@AUGMENTATIONS.register("cutmix")
class CutMix(Mixing):
    """Replace a rectangle in each image by that of another one of the batch, and as much of its label.

    Source: Yun et al. 2019. The rectangle has the image's aspect ratio and a random centre, beyond the border it is cut
    off; the share of the label is that of the pixels. Unlike in the released code each image has its own.

    Args:
        alpha: both parameters of the Beta distribution of the share that is kept.
    """

    def __init__(self, *, alpha: PositiveFloat = 1.0) -> None:
        self._alpha = alpha

    @override
    def mix(self, images: Tensor, rng: torch.Generator) -> tuple[Tensor, Mixture]:
        side = (1 - _beta(self._alpha, len(images), rng)).sqrt()
        partner = torch.randperm(len(images), generator=rng).to(images.device)
        centres = torch.rand(2, len(images), generator=rng)
        down, across = (
            ((torch.arange(size) + 0.5) / size - centre[:, None]).abs() < side[:, None] / 2
            for size, centre in zip(images.shape[2:], centres, strict=True)
        )
        inside = down[:, :, None] & across[:, None]
        share = (1 - inside.float().mean((1, 2))).to(images.device)
        mixed = torch.where(inside[:, None].to(images.device), images[partner], images)
        return mixed, Mixture(partner=partner, share=share)


def _beta(alpha: float, count: int, rng: torch.Generator) -> Tensor:
    """Draws [count] of a Beta distribution with both parameters ``alpha``."""
    first, second = torch._standard_gamma(torch.full((2, count), alpha), generator=rng)
    share: Tensor = first / (first + second)
    return share


class Chain:
    """Augmentations one after another."""

    def __init__(self, augmentations: Sequence[Augmentation]) -> None:
        self._augmentations = [(augmentation, takes_progress(augmentation)) for augmentation in augmentations]

    def __call__(self, images: Tensor, rng: torch.Generator, *, progress: float = 1.0) -> Tensor:
        """Apply all of them in order, ``progress`` being the share of the steps that are made."""
        return self._applied(images, rng, progress)[0]

    def with_labels(
        self, images: Tensor, labels: Tensor, rng: torch.Generator, *, classes: int, progress: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Do the same, and mix ``labels`` [N] or [N, classes] as the images are mixed.

        Returns the images, and their labels as they were given, or shares [N, classes] where images are mixed.
        """
        images, mixtures = self._applied(images, rng, progress)
        for mixture in mixtures:
            labels = mixture.of(labels, classes)
        return images, labels

    def _applied(self, images: Tensor, rng: torch.Generator, progress: float) -> tuple[Tensor, list[Mixture]]:
        mixtures = []
        for augmentation, is_told in self._augmentations:
            told = {"progress": progress} if is_told else {}
            if _tells(augmentation):
                images, mixture = augmentation.mix(images, rng, **told)
                mixtures.append(mixture)
            else:
                images = augmentation(images, rng, **told)
        return images, mixtures


def _tells(augmentation: Augmentation) -> TypeGuard[Mixing]:
    """Whether an augmentation mixes images and can tell which."""
    return getattr(augmentation, "mixes_images", False) and hasattr(augmentation, "mix")


def _act_of(augmentation: Augmentation) -> Callable[..., object]:
    """The function of an augmentation that is called."""
    act: Callable[..., object] = getattr(augmentation, "forward", augmentation)
    return augmentation.mix if _tells(augmentation) else act


def takes_progress(augmentation: Augmentation) -> bool:
    """Whether an augmentation is told how far the steps are."""
    return "progress" in inspect.signature(_act_of(augmentation)).parameters


def build_augmentations(
    specs: Sequence[PluginSpec],
    *,
    where: str,
    label_reader: str | None = None,
    mixed_label_reader: str | None = None,
) -> Chain:
    """Build a recipe's list of augmentations.

    Args:
        specs: the list.
        where: its recipe key.
        label_reader: what takes each image to be of one class, if anything.
        mixed_label_reader: what reads labels and takes mixed ones, if anything.

    Raises:
        RecipeError: unknown name or option, or images are mixed whose labels something reads that cannot be mixed.
    """
    augmentations = []
    for index, spec in enumerate(specs):
        key = f"{where}[{index}]"
        built = AUGMENTATIONS.build(spec.kind, spec.options, where=key)
        _refuse_of_another_kind(built, spec.kind, key)
        if getattr(built, "mixes_images", False):
            _refuse_unmixed_labels(built, f"{key}: {spec.kind} mixes images", label_reader, mixed_label_reader)
        augmentations.append(built)
    return Chain(augmentations)


def _refuse_unmixed_labels(built: Augmentation, said: str, reader: str | None, mixed_reader: str | None) -> None:
    if reader is not None:
        raise RecipeError(f"{said}, but {reader} takes each to be of one class; drop one of them")
    if mixed_reader is not None and not _tells(built):
        raise RecipeError(
            f"{said} without telling which, but {mixed_reader} reads their labels; give it a method "
            "mix(images, rng) that returns a Mixture too, or drop one of them"
        )


def _refuse_of_another_kind(augmentation: Augmentation, name: str, where: str) -> None:
    told = {"progress": 0.0} if takes_progress(augmentation) else {}
    try:
        inspect.signature(_act_of(augmentation)).bind(None, None, **told)
    except TypeError as error:
        raise RecipeError(
            f"{where}: {name} cannot be called with images and a generator of random numbers ({error}), so it is no "
            "augmentation"
        ) from None
