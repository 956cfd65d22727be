"""What a network that nobody has described shows by itself: classes, channels, size, layers."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raydfkd.config.schema import IMAGENET_MEAN, IMAGENET_STD, ImageSpace, TeacherSpec, is_file
from raydfkd.errors import RecipeError
from raydfkd.networks.answers import logits_of
from raydfkd.networks.batchnorm import layers_with_statistics
from raydfkd.networks.build import construct_network, count_parameters
from raydfkd.networks.flops import forward_flops
from raydfkd.networks.hubs import Description
from raydfkd.networks.libraries import described
from raydfkd.networks.measured import is_norm
from raydfkd.networks.pruned import pruned_teacher
from raydfkd.networks.state_files import State, read_states
from raydfkd.networks.weights import read_weights
from raydfkd.seeds import rng_from, seeded

GUESS = "a guess"
"""Begins the source of a value that nothing tells."""
SQUARES = (32, 28, 64, 224, 96, 128, 112, 160, 192, 256, 299, 384, 48, 24, 16, 8)
"""Edges that are tried; the first one that works is taken."""
EDGES = (8, 16, 24, 28, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384)
"""Edges of images that are not square."""
MOST_CHANNELS = 32
"""More are those of a layer further inside."""
SMALL = 64
"""Pixels of the longer edge up to which images are small: for generators, and batches of a hundred."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What is known of a teacher, each thing with where it is known from."""

    section: Mapping[str, Any]
    """The section ``teacher`` of a recipe."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where a key's value is from, in a few words; those of ``image_space`` under their own names."""
    norms: Mapping[str, int] = field(default_factory=dict)
    """Number of normalisation layers by class."""
    statistics: int = 0
    """Number of those that stored statistics of their training."""
    has_attention: bool = False
    has_convolutions: bool = True
    is_strided: bool = False
    """Whether half of its convolutions that see several places, or more, leave out some."""
    kernel: int = 3
    """Edge of what its first convolution sees; 3 where that cuts patches."""
    parameters: int = 0
    fixed_size: bool = False
    """Whether it takes images of one size alone."""
    takes: Callable[[int | list[int]], bool] = lambda size: False
    """Says whether it takes images of a size."""
    flops: Callable[[], float] = lambda: math.inf
    """Counts the arithmetic of its answer to an image."""
    pruned: Callable[[float], nn.Module | None] = lambda keep: None
    """Makes a network of a share of its channels; None where that cannot be done."""
    notes: tuple[str, ...] = ()
    """What the user should know, a line each."""

    @property
    def has_moments(self) -> bool:
        """Whether it stored moments that images can have."""
        return self.statistics > 0

    @property
    def space(self) -> Mapping[str, Any]:
        """The section ``image_space``: channels, size, mean and std."""
        return dict(self.section["image_space"])

    @property
    def edges(self) -> list[int]:
        """Height and width of its images in pixels."""
        return _edges(self.space["size"])

    @property
    def is_small(self) -> bool:
        """Whether its images are."""
        return max(self.edges) <= SMALL


def scout(
    network: str,
    *,
    options: Mapping[str, Any],
    weights: str | None,
    given: Mapping[str, Any],
) -> Found:
    """Look at a network: by its library's description, its file of weights, and trials on random images.

    Args:
        network: as a recipe names it.
        options: of its constructor.
        weights: as a recipe names them; None for those that it comes with.
        given: keys of the section ``teacher`` that the user knows: ``classes``, ``image_space``, ``allow_code``, ...

    Raises:
        RecipeError: it cannot be built, or something of it cannot be found and must be given.
    """
    section: dict[str, Any] = {"network": network, "options": dict(options), **given}
    if weights is not None:
        section["weights"] = weights
    known = described(section)
    if weights is None and ":" not in network:
        raise RecipeError(f"--weights is missing, and {network} comes with none; give their file")
    section.setdefault("weights", known.get("weights", "pretrained"))
    state = _state_of(section["weights"])
    space = {**known.get("image_space", {}), **given.get("image_space", {})}
    guess = (int(section.get("classes") or known.get("classes") or 2), space.get("channels"))
    outline = _built(section, guess[0], space)
    classes, classes_from = _classes(section, known, state, outline)
    space = {
        **known.get("image_space", {}),
        **_channels_in(state, known, outline),
        **given.get("image_space", {}),
    }
    module = outline if (classes or 2, space.get("channels")) == guess else _built(section, classes or 2, space)
    trial = _trial(module, space)
    sources = {"channels": "of its first layer", **_sources_of(known, given), "classes": classes_from}
    if "size" not in space:
        space["size"], sources["size"] = trial.size()
    if not classes:
        classes, sources["classes"] = trial.width(space["size"]), "width of its answer"
    space.setdefault("channels", trial.channels)
    mean, std, constants_from = _constants(module, space["channels"])
    for key, value in (("mean", mean), ("std", std)):
        if key not in space:
            space[key], sources[key] = value, constants_from
    names = known.get("class_names")
    section |= {"classes": classes, "image_space": {key: space[key] for key in ("channels", "size", "mean", "std")}}
    if names is not None and len(names) == classes:
        section.setdefault("class_names", names)
    shape = (space["channels"], *_edges(space["size"]))
    return replace(
        _layers(module, section),
        sources=sources,
        fixed_size=not trial.takes_half(space["size"]),
        takes=trial.takes,
        flops=partial(_flops, module, shape),
        pruned=partial(_pruned, module, int(classes), shape),
    )


def _sources_of(known: Description, given: Mapping[str, Any]) -> dict[str, str]:
    found = {key: "from its library" for key in known.get("image_space", {})}
    return found | {key: "given" for key in given.get("image_space", {})}


def _state_of(weights: str) -> State:
    """The largest state dict in the file; empty where there is none."""
    if not is_file(weights):
        return {}
    states = read_states(read_weights(weights, where="--weights"), f"--weights is {weights!r}")
    return max(states.values(), key=len, default={})


def _classes(section: Mapping[str, Any], known: Description, state: State, outline: nn.Module) -> tuple[int, str]:
    """Number of classes and where it is known from; 0 where only an answer can tell."""
    if "classes" in section:
        return int(section["classes"]), "given"
    if "classes" in known:
        return int(known["classes"]), "from its library"
    if ":" in str(section["network"]) and not known:  # a callable of one's own knows it
        return 0, ""
    heads = _weights_of(outline, nn.Linear, state, dimensions=2)
    return (max(2, len(heads[-1])), "of the last linear layer in the file of weights") if heads else (0, "")


def _weights_of(outline: nn.Module, kind: type[nn.Module], state: State, *, dimensions: int) -> list[Tensor]:
    """Weights of such layers in a file, in the network's order, which a file of safetensors does not keep."""
    names = [f"{name}.weight" for name, module in outline.named_modules() if isinstance(module, kind)]
    found = [
        value
        for name in names
        for key, value in state.items()
        if value.ndim == dimensions and (key == name or key.endswith(f".{name}"))
    ]
    return found or [value for key, value in state.items() if value.ndim == dimensions and key.endswith("weight")]


def _channels_in(state: State, known: Description, outline: nn.Module) -> Description:
    """Channels of the first convolution in a file of weights, and constants for them where the library's are others."""
    first = next(iter(_weights_of(outline, nn.Conv2d, state, dimensions=4)), None)
    space = known.get("image_space", {})
    if first is None or space.get("channels") == first.shape[1] or first.shape[1] > MOST_CHANNELS:
        return {}
    constants = {key: [0.5] * first.shape[1] for key in ("mean", "std")} if "mean" in space else {}
    return {"channels": first.shape[1], **constants}


def _built(section: Mapping[str, Any], classes: int, space: Mapping[str, Any]) -> nn.Module:
    channels = int(space.get("channels", 3))
    spec = TeacherSpec(
        network=section["network"],
        options=section["options"],
        classes=classes,
        weights=section["weights"],
        allow_code=section.get("allow_code", False),
        image_space=ImageSpace(channels=channels, size=8, mean=(0.5,) * channels, std=(0.5,) * channels),
    )
    return construct_network(spec, spec, where="teacher", seed=0).eval()


def _trial(network: nn.Module, space: Mapping[str, Any]) -> _Trial:
    """The trials of a network; where nothing tells its channels, coloured images are tried before grey ones."""
    if known := space.get("channels") or _channels(network):
        return _Trial(network, channels=known)
    sizes = [space["size"]] if "size" in space else SQUARES
    coloured, grey = (_Trial(network, channels=channels) for channels in (3, 1))
    return grey if any(map(grey.takes, sizes)) and not any(map(coloured.takes, sizes)) else coloured


def _channels(network: nn.Module) -> int | None:
    """Channels of the images that a network's first convolution takes; None where it has none."""
    if (convolution := _first_convolution(network)) is not None:
        return convolution.in_channels
    first = next((value for value in network.parameters() if value.ndim == 4), None)
    return None if first is None else first.shape[1]


def _first_convolution(network: nn.Module) -> nn.Conv2d | None:
    return next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)


class _Trial:
    """Asks a network about random images of many sizes."""

    def __init__(self, network: nn.Module, *, channels: int) -> None:
        self._network, self.channels = network, channels

    def size(self) -> tuple[int | list[int], str]:
        """A size that the network takes, and how sure that is.

        Raises:
            RecipeError: none of those that were tried.
        """
        squares = [edge for edge in SQUARES if self.takes(edge)]
        if len(squares) == 1:
            return squares[0], "the only usual size that it takes"
        if squares:
            small = [edge for edge in squares if edge <= 64] or squares
            sizes = f"{min(squares)} to {max(squares)}" if len(squares) > 3 else ", ".join(map(str, sorted(squares)))
            return small[0], f"{GUESS}, it takes {sizes}; set what it was trained on"
        pairs = itertools.permutations(EDGES, 2)
        for pair in sorted(pairs, key=lambda pair: (max(pair) / min(pair), pair[0] < pair[1], max(pair))):
            if self.takes([*pair]):
                return [*pair], "the first size tried that it takes; set what it was trained on"
        if numbers := self._vector():
            raise RecipeError(
                f"--network takes vectors of {numbers} numbers and no images; give one that flattens them first, such "
                "as torch.nn.Sequential(torch.nn.Flatten(), network)"
            )
        raise RecipeError(
            "--network takes random images of no usual size; give --size, such as --size 75 or --size 96x64"
        )

    def width(self, size: int | list[int]) -> int:
        """Classes in its answer to images of that size.

        Raises:
            RecipeError: it does not answer.
        """
        answer = self._answer(size)
        if answer is None:
            height, width = _edges(size)
            raise RecipeError(f"--size is {size}, but --network cannot take {self.channels}x{height}x{width} images")
        return max(2, answer.shape[1]) if answer.ndim > 1 else 2

    def takes(self, size: int | list[int]) -> bool:
        """Whether it takes images of that size."""
        return self._answer(size) is not None

    def takes_half(self, size: int | list[int]) -> bool:
        """Whether it takes images of half the size too."""
        return self.takes([edge // 2 for edge in _edges(size)])

    def _vector(self) -> int:
        """Numbers of the vectors that the network takes; 0 where it takes none."""
        first = next((module for module in self._network.modules() if isinstance(module, nn.Linear)), None)
        return first.in_features if first is not None and self._of(first.in_features) is not None else 0

    def _answer(self, size: int | list[int]) -> Tensor | None:
        return self._of(self.channels, *_edges(size))

    def _of(self, *shape: int) -> Tensor | None:
        """Its answer to two random inputs of that shape; None where it has none."""
        images = torch.randn(2, *shape, generator=rng_from(0))
        with seeded(0), torch.no_grad(), contextlib.suppress(Exception):  # code of the user's may raise anything
            answer = logits_of(self._network(images))
            return answer if len(answer) == 2 else None
        return None


def _flops(network: nn.Module, shape: tuple[int, ...]) -> float:
    with contextlib.suppress(Exception):  # of operators that nobody knows to count
        return forward_flops(network, shape)
    return math.inf


def _pruned(network: nn.Module, classes: int, shape: tuple[int, int, int], keep: float) -> nn.Module | None:
    with contextlib.suppress(ValueError), torch.no_grad():
        pruned = pruned_teacher(network, classes, shape, keep=keep)
        logits_of(pruned(torch.zeros(2, *shape)), classes, images=2)
        return pruned
    return None


def _edges(size: int | list[int]) -> list[int]:
    """Height and width."""
    return [size, size] if isinstance(size, int) else size


def _constants(network: nn.Module, channels: int) -> tuple[list[float], list[float], str]:
    inside = next(_normalizers(network, channels), None)
    if inside is not None:
        return [0.0] * channels, [1.0] * channels, f"it normalises by itself ({inside}), so it takes images in [0, 1]"
    if channels == 3:
        return [*IMAGENET_MEAN], [*IMAGENET_STD], f"{GUESS}, ImageNet's; set those that it was trained with"
    return [0.5] * channels, [0.5] * channels, f"{GUESS}; set those that it was trained with"


def _normalizers(network: nn.Module, channels: int) -> Iterator[str]:
    """Names of modules that subtract a mean of each channel and divide by a standard deviation, by what they hold."""
    for name, module in network.named_modules():
        held = {key: getattr(module, key, None) for key in ("mean", "std")}
        sizes = [
            value.numel() if isinstance(value, Tensor) else len(value) if isinstance(value, list | tuple) else 0
            for value in held.values()
        ]
        if all(size in (1, channels) and size for size in sizes):
            yield name or type(module).__name__


def _is_strided(network: nn.Module) -> bool:
    seeing = [module for module in network.modules() if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1]
    strided = [module for module in seeing if 1 < max(module.stride) < max(module.kernel_size)]
    return 0 < len(seeing) <= 2 * len(strided)


def _kernel(network: nn.Module) -> int:
    first = _first_convolution(network)
    return 3 if first is None or max(first.kernel_size) <= max(first.stride) else max(first.kernel_size)


def _layers(network: nn.Module, section: Mapping[str, Any]) -> Found:
    return Found(
        section=section,
        norms=Counter(type(module).__name__ for module in network.modules() if is_norm(module)),
        statistics=len(layers_with_statistics(network)),
        has_attention=any("attention" in type(module).__name__.lower() for module in network.modules()),
        has_convolutions=_channels(network) is not None,
        is_strided=_is_strided(network),
        kernel=_kernel(network),
        parameters=count_parameters(network),
    )
