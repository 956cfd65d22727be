"""Teachers and students: small networks by name, torchvision's, any ``module:callable``; and their weights."""

from __future__ import annotations

import hashlib
import importlib
import io
from collections.abc import Mapping
from typing import Any

import fsspec
import safetensors.torch
import torch
from torch import Tensor, nn

from raydfkd.registry import RecipeError, Registry, did_you_mean
from raydfkd.sections import ImageSpace, Positive, StudentSpec, TeacherSpec

NETWORKS: Registry[nn.Module] = Registry("network", [])
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)
"""What networks raise on images of a size or channel count that they cannot take."""


def _conv_norm_relu(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


@NETWORKS.register("convnet")
class ConvNet(nn.Module):
    """A stack of 3x3 convolutions of stride 2 with BatchNorm and ReLU, mean pooling, one linear layer.

    Args:
        widths: output channels of each convolution.
    """

    def __init__(self, classes: int, channels: int, *, widths: tuple[Positive, ...] = (32, 64, 128)) -> None:
        super().__init__()
        sizes = [channels, *widths]
        self.body = nn.Sequential(*(_conv_norm_relu(a, b, 2) for a, b in zip(sizes, sizes[1:], strict=False)))
        self.head = nn.Linear(sizes[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] to logits [N, K]."""
        logits: Tensor = self.head(self.body(images).mean((2, 3)))
        return logits


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _conv_norm_relu(inputs, outputs, stride)
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))
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
    """

    def __init__(self, classes: int, channels: int, *, depth: int = 20, width: Positive = 16) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth is {depth}; it must be 6n + 2, such as 8 or 20")
        blocks: list[nn.Module] = [_conv_norm_relu(channels, width, 1)]
        inputs = width
        for stage in range(3):
            for block in range((depth - 2) // 6):
                outputs = width << stage
                blocks.append(_Residual(inputs, outputs, 2 if stage and not block else 1))
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


def build_network(spec: TeacherSpec | StudentSpec, teacher: TeacherSpec, *, where: str, seed: int) -> nn.Module:
    """Build a network with weights drawn from ``seed`` and try it on two blank images of the teacher's image space.

    Raises:
        RecipeError: unknown name, wrong options, an image size or class count that does not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _construct(spec, teacher, where)
    _try(network, spec.network, teacher, where)
    return network


def _construct(spec: TeacherSpec | StudentSpec, teacher: TeacherSpec, where: str) -> nn.Module:
    family, colon, name = spec.network.partition(":")
    if not colon:
        NETWORKS.get(spec.network, where=f"{where}.network")
        return NETWORKS.build(
            spec.network, spec.options, teacher.classes, teacher.image_space.channels, where=f"{where}.options"
        )
    if family == "torchvision":
        from torchvision import models  # heavy, and only needed here

        if name not in models.list_models():
            raise RecipeError(
                f"{where}.network: torchvision has no {name!r}; {did_you_mean(name, models.list_models())}"
            )
        return _call(lambda **options: models.get_model(name, **options), spec, where, num_classes=teacher.classes)
    try:
        factory = getattr(importlib.import_module(family), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two: no absolute module name
        raise RecipeError(f"{where}.network is {spec.network!r}, which cannot be imported: {error}") from error
    return _call(factory, spec, where)


def _call(factory: Any, spec: TeacherSpec | StudentSpec, where: str, **supplied: Any) -> nn.Module:
    try:
        network = factory(**supplied, **spec.options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecipeError(f"{where}.options do not suit {spec.network}: {error}") from error
    if not isinstance(network, nn.Module):
        raise RecipeError(f"{where}.network: {spec.network} returned {type(network).__name__}, not a torch.nn.Module")
    return network


def _try(network: nn.Module, name: str, teacher: TeacherSpec, where: str) -> None:
    space = teacher.image_space
    try:
        logits = _blank_logits(network, space)
    except REFUSALS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        sizes = [size for size in (28, 32, 64, 96, 112, 128, 224, 256, 299) if _takes(network, space, size)]
        remedy = f"sizes that work: {', '.join(map(str, sizes))}" if sizes else "check channels and network"
        raise RecipeError(
            f"teacher.image_space.size is {space.size}, but {where}.network {name} cannot take {space.channels}x"
            f"{space.size}x{space.size} images ({reason}); {remedy}"
        ) from None
    if not isinstance(logits, Tensor) or logits.shape != (2, teacher.classes):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise RecipeError(
            f"teacher.classes is {teacher.classes}, but {where}.network {name} answers {shape} for 2 images; "
            f"it must be [2, {teacher.classes}]"
        )


def _blank_logits(network: nn.Module, space: ImageSpace, size: int | None = None) -> Any:
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            return network(torch.zeros(2, space.channels, size or space.size, size or space.size))
    finally:
        network.train(training)


def _takes(network: nn.Module, space: ImageSpace, size: int) -> bool:
    try:
        _blank_logits(network, space, size)
    except REFUSALS:
        return False
    return True


def weights_exist(uri: str, *, where: str) -> bool:
    """Whether there is a file at ``uri``.

    Raises:
        RecipeError: nobody can say, because its file system does not answer.
    """
    if uri == "random":
        return True
    try:
        filesystem, path = fsspec.url_to_fs(uri)
        return bool(filesystem.exists(path))
    except Exception as error:  # every file system has errors of its own; here they become the user's line
        raise _unreadable(uri, error, where) from None


def load_weights(network: nn.Module, uri: str, *, where: str) -> str:
    """Load a state dict into ``network``; return the SHA-256 of the file. Nothing is ever unpickled but tensors.

    Raises:
        RecipeError: no such file, not weights, or weights of another network.
    """
    if uri == "random":
        return hashlib.sha256(save_bytes(network)).hexdigest()
    try:
        with fsspec.open(uri, "rb") as file:
            content: bytes = file.read()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise RecipeError(
            f"{where} is {uri!r}: no such file; give trained weights, or teacher.train to train them"
        ) from None
    except Exception as error:  # every file system has errors of its own; here they become the user's line
        raise _unreadable(uri, error, where) from None
    state = _parse_weights(content, uri, where)
    own = network.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if missing or unexpected or reshaped:
        problem = (
            f"{missing[0]} is missing" if missing else
            f"{unexpected[0]} is not in the network" if unexpected else
            f"{min(reshaped)} is {list(state[min(reshaped)].shape)}, the network's {list(own[min(reshaped)].shape)}"
        )  # fmt: skip
        raise RecipeError(f"{where} is {uri!r}: weights of another network ({problem}); check network and options")
    network.load_state_dict(dict(state))
    return hashlib.sha256(content).hexdigest()


def _unreadable(uri: str, error: Exception, where: str) -> RecipeError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return RecipeError(f"{where} is {uri!r}: cannot be read ({reason}); give a file that this machine can read")


def _parse_weights(content: bytes, uri: str, where: str) -> Mapping[str, Tensor]:
    refusal = RecipeError(
        f"{where} is {uri!r}: not a state dict of tensors; give a .safetensors file or torch.save(net.state_dict())"
    )
    try:
        if uri.endswith(".safetensors"):
            return safetensors.torch.load(content)
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # any parser's complaint means the same to the user
        raise refusal from None
    if not isinstance(state, dict):
        raise refusal
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise refusal
    return state


def save_bytes(network: nn.Module, metadata: Mapping[str, str] | None = None) -> bytes:
    """The network's state dict as a safetensors file."""
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    return safetensors.torch.save(state, dict(metadata or {}))


def count_parameters(network: nn.Module) -> int:
    """Number of weights."""
    return sum(parameter.numel() for parameter in network.parameters())
