"""Images drawn by simple models of how pictures come about, which know no data: for a teacher to say what it sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from raydfkd.config.schema import ImageSpace

CURVE_POINTS = 12
LEAVES = 12
PARTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvas:
    """Draws the chances of ``count`` images at once, each image's its own."""

    count: int
    channels: int
    height: int
    width: int
    rng: torch.Generator
    plain: tuple[float, float]
    """Probabilities that the ground of an image is black, and white."""

    def uniform(self, low: float = 0.0, high: float = 1.0, channels: int = 1) -> Tensor:
        """Numbers [N, channels, 1, 1] between ``low`` and ``high``."""
        return low + (high - low) * torch.rand(self.count, channels, 1, 1, generator=self.rng)

    def chance(self, probability: float) -> Tensor:
        """Truth values [N, 1, 1, 1]."""
        return self.uniform() < probability

    def tone(self) -> Tensor:
        """A colour in [0, 1] of each image [N, C, 1, 1]: a grey and, in a few channels, something of each's own."""
        grey = self.uniform()
        if self.channels == 1:
            return grey
        return (grey + self.uniform() * self.uniform(-0.5, 0.5, self.channels)).clamp(0, 1)

    def ground(self) -> Tensor:
        """What lies behind all [N, C, 1, 1]."""
        black, white = self.plain
        drawn = self.uniform()
        return torch.where(drawn < black, 0.0, torch.where(drawn >= 1 - white, 1.0, self.tone()))

    def places(self) -> tuple[Tensor, Tensor]:
        """Middles of the pixels across and down, [1, 1, 1, W] and [1, 1, H, 1]; the shorter edge is 1 long."""
        across, down = ((torch.arange(edge) + 0.5) / self.shorter for edge in (self.width, self.height))
        return across.view(1, 1, 1, -1), down.view(1, 1, -1, 1)

    @property
    def shorter(self) -> int:
        """Pixels of the shorter edge."""
        return min(self.height, self.width)

    @property
    def ends(self) -> tuple[float, float]:
        """Where the image ends across and down."""
        return self.width / self.shorter, self.height / self.shorter


def spectrum(canvas: Canvas) -> Tensor:
    """Noise of a power law, 1 / f^a with a from 0.5 to 3, brightness and contrast at random: clouds and textures."""
    across, down = torch.fft.rfftfreq(canvas.width), torch.fft.fftfreq(canvas.height)
    frequency = (across**2 + down[:, None] ** 2).sqrt()
    frequency[0, 0] = 1.0
    amplitude = torch.pow(frequency, -canvas.uniform(0.5, 3.0))
    amplitude[..., 0, 0] = 0.0
    shape = (canvas.count, canvas.channels, canvas.height, canvas.width // 2 + 1, 2)
    phases = torch.view_as_complex(torch.randn(shape, generator=canvas.rng))
    if canvas.channels > 1:
        own = canvas.uniform()  # against what all channels have in common
        phases = own * phases + (1 - own) * phases.mean(1, keepdim=True)
    field: Tensor = torch.fft.irfft2(phases * amplitude, s=(canvas.height, canvas.width))
    field = field / field.std((1, 2, 3), keepdim=True)
    return (canvas.tone() + canvas.uniform(0.1, 0.6) * field).clamp(0, 1)


def dead_leaves(canvas: Canvas) -> Tensor:
    """Ellipses and boxes of any size and tone that fall upon each other (dead leaves, Matheron 1968)."""
    images = canvas.ground().expand(-1, -1, canvas.height, canvas.width)
    right, bottom = canvas.ends
    for _ in range(LEAVES):
        middle = canvas.uniform(-0.1, right + 0.1), canvas.uniform(-0.1, bottom + 0.1)
        radii = 0.03 + 0.4 * canvas.uniform() ** 2, 0.03 + 0.4 * canvas.uniform() ** 2
        shape = _Shape(middle=middle, radii=radii, angle=canvas.uniform(0, math.pi), is_box=canvas.chance(0.5))
        mask = shape.covers(canvas, *canvas.places()) * canvas.chance(0.6)
        images = images + mask * (canvas.tone() - images)
    return images


def strokes(canvas: Canvas) -> Tensor:
    """One to four curved strokes, most of which go on where the last one ended: writing, outlines."""
    ground = canvas.ground()
    images = ground.expand(-1, -1, canvas.height, canvas.width)
    pen, tone = _Pen(canvas), canvas.tone()
    tone = torch.where((tone - ground).abs().mean(1, keepdim=True) < 0.3, 1 - ground, tone)
    thickness, number = canvas.uniform(0.02, 0.09), canvas.uniform(0, 4)
    for place in range(4):
        mask = pen.curve(0.35).covers(canvas, *canvas.places(), thickness) * (number >= place)
        images = images + mask * (tone - images)
    return images


def figures(canvas: Canvas) -> Tensor:
    """One thing near the middle of a ground, of one to five parts, filled with tones or textures, half mirrored."""
    ground, filling = canvas.ground(), spectrum(canvas)
    images = ground.expand(-1, -1, canvas.height, canvas.width)
    pen, kind = _Pen(canvas), canvas.uniform()
    base, contrast, is_flat = canvas.tone(), canvas.uniform(0, 0.8), canvas.chance(0.5)
    size, thickness = canvas.uniform(0.06, 0.36), canvas.uniform(0.02, 0.1)
    number, is_mirrored = canvas.uniform(0, PARTS), canvas.chance(0.5)
    (across, down), (right, bottom) = canvas.places(), canvas.ends
    for place in range(PARTS):
        form = torch.where(canvas.chance(0.6), kind, canvas.uniform())
        middle = right / 2 + canvas.uniform(-0.3, 0.3), bottom / 2 + canvas.uniform(-0.35, 0.35)
        radii = size * canvas.uniform(0.3, 1.5), size * canvas.uniform(0.3, 1.9)
        lean = torch.where(canvas.chance(0.5), 0.1, 1.0) * canvas.uniform(-math.pi / 2, math.pi / 2)
        taper = canvas.uniform(-0.4, 0.4)
        shape = _Shape(middle=middle, radii=radii, angle=lean, is_box=form < 2 / 3, taper=taper)
        curve = pen.curve(0.3)
        plain, mirrored = (
            torch.where(form < 1 / 3, curve.covers(canvas, x, down, thickness), shape.covers(canvas, x, down))
            for x in (across, right - across)
        )
        mask = torch.where(is_mirrored, torch.maximum(plain, mirrored), plain) * (number >= place)
        tone = (base + canvas.chance(0.5) * canvas.uniform(-0.3, 0.3)).clamp(0, 1)
        tone = torch.where(canvas.chance(0.12), ground, tone)  # a hole
        filled = torch.where(is_flat, tone, (tone + contrast * (filling - 0.5)).clamp(0, 1))
        images = images + mask * (filled - images)
    return images


Model = Literal["spectrum", "dead_leaves", "strokes", "figures"]
MODELS: dict[Model, Callable[[Canvas], Tensor]] = {
    "spectrum": spectrum,
    "dead_leaves": dead_leaves,
    "strokes": strokes,
    "figures": figures,
}
"""Models of pictures by name; each draws images in [0, 1], [N, C, H, W]. In the spirit of Baradad et al. 2021."""


def draw(
    models: Sequence[Model], count: int, space: ImageSpace, rng: torch.Generator, *, plain: tuple[float, float]
) -> Tensor:
    """Images in [0, 1], [count, C, H, W], one model's after another's, as many of each as come out even.

    Args:
        models: names among ``MODELS``.
        count: how many in all.
        space: channels and size.
        rng: draws.
        plain: as ``Canvas`` has it.
    """
    drawn = []
    for place, model in enumerate(models):
        share = (place + 1) * count // len(models) - place * count // len(models)
        if share:
            canvas = Canvas(
                count=share, channels=space.channels, height=space.height, width=space.width, rng=rng, plain=plain
            )
            drawn.append(MODELS[model](canvas))
    return torch.cat(drawn)


def plain_grounds(space: ImageSpace) -> tuple[float, float]:
    """How probably an image's ground is black, and how probably white, from the constants of the teacher's images.

    Values spread evenly from black to white deviate from their mean by 0.58 of it; the more above a half that is, the
    more of the picture is black, and alike for white. Digits and garments come to black, photographs to neither; a
    quarter each where the constants are no images' statistics. Half the grounds or more keep a tone of their own, for
    a student of black grounds alone is the worse for it even where all real ones are black.
    """
    mean, std = (sum(values) / len(values) for values in (space.mean, space.std))
    if not std**2 <= mean * (1 - mean):
        return 0.25, 0.25
    black, white = (min(1.0, max(0.0, std / distance - 0.5)) for distance in (mean, 1 - mean))
    whole = 2 * max(1.0, black + white)
    return black / whole, white / whole


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """An ellipse or a box of each image."""

    middle: tuple[Tensor, Tensor]
    radii: tuple[Tensor, Tensor]
    angle: Tensor
    is_box: Tensor
    taper: Tensor | None = None
    """Relative change of the width from the middle to an end."""

    def covers(self, canvas: Canvas, across: Tensor, down: Tensor) -> Tensor:
        """How much of each pixel it covers, in [0, 1]."""
        x, y = across - self.middle[0], down - self.middle[1]
        cos, sin = self.angle.cos(), self.angle.sin()
        along, beside = (x * cos + y * sin) / self.radii[0], (y * cos - x * sin) / self.radii[1]
        if self.taper is not None:
            along = along / (1 + 2 * self.taper * beside).clamp(0.2, 2.0)
        box, ellipse = torch.maximum(along.abs(), beside.abs()), (along**2 + beside**2).sqrt()
        outwards = torch.where(self.is_box, box, ellipse)
        return ((1 - outwards) * torch.minimum(*self.radii) * canvas.shorter + 0.5).clamp(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Curve:
    """A quadratic Bezier curve of each image, by points on it."""

    points: tuple[Tensor, ...]
    """Each [N, 2, 1, 1]: across and down."""

    def covers(self, canvas: Canvas, across: Tensor, down: Tensor, thickness: Tensor) -> Tensor:
        """How much of each pixel a stroke of ``thickness`` to either side covers, in [0, 1]."""
        nearest: Tensor | None = None
        for point in self.points:
            squared = (across - point[:, :1]) ** 2 + (down - point[:, 1:]) ** 2
            nearest = squared if nearest is None else torch.minimum(nearest, squared)
        assert nearest is not None, "a curve has points"
        return ((thickness - nearest.sqrt()) * canvas.shorter + 0.5).clamp(0, 1)


class _Pen:
    """Draws one curve after another."""

    def __init__(self, canvas: Canvas) -> None:
        self._canvas = canvas
        self._at = self._somewhere()

    def curve(self, lifted: float) -> _Curve:
        """The next curve, which begins where the last one ended unless the pen is ``lifted``, with that probability."""
        is_lifted, fresh = self._canvas.chance(lifted), self._somewhere()
        start, via, end = torch.where(is_lifted, fresh, self._at), self._somewhere(), self._somewhere()
        self._at = end
        points = []
        for step in range(CURVE_POINTS):
            t = step / (CURVE_POINTS - 1)
            points.append((1 - t) ** 2 * start + 2 * t * (1 - t) * via + t**2 * end)
        return _Curve(points=tuple(points))

    def _somewhere(self) -> Tensor:
        return self._canvas.uniform(0.12, 0.88, channels=2) * torch.tensor(self._canvas.ends).view(1, 2, 1, 1)
