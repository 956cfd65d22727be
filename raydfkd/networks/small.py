"""Small networks of the papers, by short names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from raydfkd.config.schema import Positive
from raydfkd.networks.build import NETWORKS

Norm = Callable[[int], nn.Module]
"""Makes the normalisation of so many channels."""


def _conv_norm_relu(inputs: int, outputs: int, stride: int, norm: Norm = nn.BatchNorm2d) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=norm is _no_norm)
    return nn.Sequential(convolution, norm(outputs), nn.ReLU(inplace=True))


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(math.gcd(8, channels), channels)


def _no_norm(channels: int) -> nn.Module:  # noqa: ARG001 - as the others
    return nn.Identity()


NormName = Literal["batch", "group", "none"]
NORMS: dict[NormName, Norm] = {"batch": nn.BatchNorm2d, "group": _group_norm, "none": _no_norm}
"""Normalisations by name; GroupNorm has eight groups or fewer."""


@NETWORKS.register("convnet")
class ConvNet(nn.Module):
    """A stack of 3x3 convolutions of stride 2 with BatchNorm and ReLU, mean pooling, one linear layer.

    Args:
        widths: output channels of each convolution.
        norm: batch (BatchNorm), group (GroupNorm) or none.
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        *,
        widths: tuple[Positive, ...] = (32, 64, 128),
        norm: NormName = "batch",
    ) -> None:
        super().__init__()
        sizes = [channels, *widths]
        layers = (_conv_norm_relu(a, b, 2, NORMS[norm]) for a, b in zip(sizes, sizes[1:], strict=False))
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(sizes[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] to logits [N, K]."""
        logits: Tensor = self.head(self.body(images).mean((2, 3)))
        return logits


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.first = _conv_norm_relu(inputs, outputs, stride, norm)
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), norm(outputs))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, norm(outputs))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        summed: Tensor = self.relu(self.second(self.first(x)) + self.shortcut(x))
        return summed


@NETWORKS.register("resnet_small")
class SmallResNet(nn.Module):
    """Residual network for images of 28 to 64 pixels: three stages of basic blocks (He et al. 2016, part 4.2).

    Args:
        depth: layers, 6n + 2 (8, 20, 32, 56).
        width: channels of the first stage.
        norm: batch (BatchNorm), group (GroupNorm) or none.
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        *,
        depth: int = 20,
        width: Positive = 16,
        norm: NormName = "batch",
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth is {depth}; it must be 6n + 2, such as 8 or 20")
        made = NORMS[norm]
        blocks: list[nn.Module] = [_conv_norm_relu(channels, width, 1, made)]
        inputs = width
        for stage in range(3):
            for block in range((depth - 2) // 6):
                outputs = width << stage
                blocks.append(_Residual(inputs, outputs, 2 if stage and not block else 1, made))
                inputs = outputs
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] to logits [N, K]."""
        logits: Tensor = self.head(self.body(images).mean((2, 3)))
        return logits


@NETWORKS.register("lenet5")
class LeNet5(nn.Module):
    """LeNet-5 for 32-pixel images, ReLU and max pooling, no BatchNorm; ``shrink: 2`` halves every layer.

    Args:
        shrink: divides the width of every hidden layer; at most 6.
    """

    def __init__(self, classes: int, channels: int, *, shrink: Positive = 1) -> None:
        super().__init__()
        if shrink > 6:
            raise ValueError(f"shrink is {shrink}, but the first layer has 6 channels; use at most 6")
        six, sixteen, hidden, features = (width // shrink for width in (6, 16, 120, 84))
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, six, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(six, sixteen, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(sixteen, hidden, 5), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(hidden, features), nn.ReLU()),
        )
        self.head = nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, 32, 32] to logits [N, K]."""
        logits: Tensor = self.head(self.body(images))
        return logits
