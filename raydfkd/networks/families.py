"""Small networks of other families, for images of 28 to 64 pixels: plain, linear, VGG, depthwise, attention."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from raydfkd.config.schema import Positive
from raydfkd.networks.build import NETWORKS


@NETWORKS.register("plain_cnn")
class PlainCNN(nn.Module):
    """Two convolutions, max pooling, two linear layers, as tutorials write a network for digits; one size of images.

    Args:
        widths: channels of the two convolutions and of the hidden linear layer.
        size: edge of the images, or height and width.
        norm: BatchNorm after each convolution.
        pools: 1 for a pooling after both convolutions, 2 for one after each, which is a fraction of the work.
        kernel: edge of what a convolution sees.
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        *,
        widths: tuple[Positive, Positive, Positive] = (32, 64, 128),
        size: Positive | tuple[Positive, Positive] = 32,
        norm: bool = False,
        pools: Literal[1, 2] = 1,
        kernel: Literal[3, 5] = 3,
    ) -> None:
        super().__init__()
        *convolved, hidden = widths
        layers: list[nn.Module] = []
        edges = [size, size] if isinstance(size, int) else [*size]
        inputs = channels
        for index, outputs in enumerate(convolved):
            layers += [nn.Conv2d(inputs, outputs, kernel), *([nn.BatchNorm2d(outputs)] if norm else []), nn.ReLU()]
            inputs, edges = outputs, [edge - kernel + 1 for edge in edges]
            if pools == 2 or index == 1:
                layers.append(nn.MaxPool2d(2))
                edges = [edge // 2 for edge in edges]
        layers += [nn.Flatten(), nn.Linear(inputs * math.prod(edges), hidden), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] to logits [N, K]."""
        logits: Tensor = self.head(self.body(images))
        return logits


@NETWORKS.register("mlp")
class MLP(nn.Module):
    """Linear layers with ReLU on all pixels at once; one size of images.

    Args:
        widths: of the hidden layers.
        size: edge of the images, or height and width.
        norm: BatchNorm after each hidden layer.
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        *,
        widths: tuple[Positive, ...] = (256, 128),
        size: Positive | tuple[Positive, Positive] = 32,
        norm: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        height, width = (size, size) if isinstance(size, int) else size
        inputs = channels * height * width
        for outputs in widths:
            layers += [nn.Linear(inputs, outputs), *([nn.BatchNorm1d(outputs)] if norm else []), nn.ReLU()]
            inputs = outputs
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] to logits [N, K]."""
        logits: Tensor = self.head(self.body(images))
        return logits


@NETWORKS.register("vgg_small")
class SmallVGG(nn.Module):
    """Pairs of 3x3 convolutions with BatchNorm between max poolings, mean pooling, one linear layer (VGG, 2014).

    Args:
        widths: channels of each pair.
    """

    def __init__(self, classes: int, channels: int, *, widths: tuple[Positive, ...] = (16, 32, 64)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip((channels, *widths), widths, strict=False):
            for taken in (inputs, outputs):
                layers += [nn.Conv2d(taken, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] to logits [N, K]."""
        logits: Tensor = self.head(self.body(images).mean((2, 3)))
        return logits


class _InvertedResidual(nn.Module):
    """Wider by a 1x1 convolution, depthwise 3x3, narrow again; added to what came in where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inside = inputs * expansion
        self.layers = nn.Sequential(
            *(nn.Conv2d(inputs, inside, 1, bias=False), nn.BatchNorm2d(inside), nn.ReLU6()),
            nn.Conv2d(inside, inside, 3, stride=stride, padding=1, groups=inside, bias=False),
            *(nn.BatchNorm2d(inside), nn.ReLU6()),
            *(nn.Conv2d(inside, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.layers(x)
        return x + changed if self.is_residual else changed


@NETWORKS.register("mobilenet_small")
class SmallMobileNet(nn.Module):
    """Inverted residuals with depthwise convolutions (MobileNetV2, Sandler et al. 2018), three stages of two.

    Args:
        width: channels of the first stage; doubles with each.
        expansion: how much wider the blocks are inside.
    """

    def __init__(self, classes: int, channels: int, *, width: Positive = 16, expansion: Positive = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.ReLU6()]
        inputs = width
        for stage in range(3):
            outputs = width << stage
            layers.append(_InvertedResidual(inputs, outputs, 2 if stage else 1, expansion))
            layers.append(_InvertedResidual(outputs, outputs, 1, expansion))
            inputs = outputs
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] to logits [N, K]."""
        logits: Tensor = self.head(self.body(images).mean((2, 3)))
        return logits


@NETWORKS.register("vit_small")
class SmallViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2020) with LayerNorm first and mean pooling; one size of images.

    Args:
        size: edge of the images.
        patch: edge of a patch, which divides ``size``.
        width: of a token.
        depth: blocks.
        heads: of each attention; divides ``width``.
    """

    def __init__(  # noqa: PLR0913 - one option each
        self,
        classes: int,
        channels: int,
        *,
        size: Positive = 32,
        patch: Positive = 4,
        width: Positive = 64,
        depth: Positive = 3,
        heads: Positive = 4,
    ) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(f"size is {size} and patch {patch}, which does not divide it")
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.places = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, size, size] to logits [N, K]."""
        tokens: Tensor = self.patches(images).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.head(self.norm(tokens).mean(1))
        return logits
