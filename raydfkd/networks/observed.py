"""A network plus what the objective needs to see of its inside."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raydfkd.errors import RecipeError
from raydfkd.networks.answers import logits_of
from raydfkd.networks.attention import Attention, AttentionTrace
from raydfkd.networks.batchnorm import LayerMoments, MomentsTrace, layers_with_statistics, normalize_by_kernel
from raydfkd.networks.compiled import Compiled
from raydfkd.networks.input_gradients import FastInputGradients
from raydfkd.networks.layout import lay_channels_last
from raydfkd.networks.measured import Watched, joined_moments, watched_layers
from raydfkd.networks.taps import find_head, layer_at, tap_input, tap_output, wrapped
from raydfkd.seeds import rng_from, seed_globally, seeded

logger = logging.getLogger(__name__)


class Need(Enum):
    """What a term reads beyond images, targets and the teacher's logits."""

    FEATURES = "features"
    """Input of the linear layer that makes the teacher's logits."""
    MOMENTS = "moments"
    """BatchNorm statistics of the whole batch beside those that training stored."""
    CLASS_MOMENTS = "class_moments"
    """The same, for each class of the batch by itself."""
    IMAGE_MOMENTS = "image_moments"
    """The same, for each image by itself, over its positions."""
    STUDENT = "student"
    """The student's logits."""
    LATENTS = "latents"
    """Latents that a generator made the images from."""
    ATTENTION = "attention"
    """Maps and outputs of the self-attention of every block."""


MOMENTS = (Need.IMAGE_MOMENTS, Need.CLASS_MOMENTS, Need.MOMENTS)
"""Needs of moments, the finest first: of those of parts, those of larger ones follow."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The output of one layer of the network: a need that names it by its path."""

    path: str
    """As ``named_modules`` has it, such as ``body.2.1``, or ``taps.FIRST_CONVOLUTION``."""


Tap = Need | Layer
"""One thing to read of a network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What a network says of a batch of N images."""

    logits: Tensor
    """[N, K]."""
    features: Tensor | None = None
    """[N, D]."""
    moments: tuple[LayerMoments, ...] = ()
    """One entry a BatchNorm layer, in the order in which the forward pass meets them."""
    layers: Mapping[str, Tensor] = field(default_factory=dict)
    """Outputs of the layers asked for, by their paths."""
    attention: tuple[Attention, ...] = ()
    """One entry a block of self-attention, in the order in which the forward pass meets them."""


class ObservedNetwork:
    """A network as the judge sees it: only the ``taps`` asked for are installed, and they cost nothing otherwise.

    A frozen network is copied, put in eval mode and takes no gradients to its weights, so a backward pass only
    computes the gradient of its input. A live one (a student) is used as it is; ``batchnorm`` says whether it
    normalises by its running statistics or by those of the batch.

    Moments are compared with those that BatchNorm stored, or, where ``statistics`` is measured, with those of pictures
    that ``measure`` is given, in the layers that ``networks.measured`` says.

    Where a layer lies is found by running the network on two random images: at once where ``image_shape`` is given,
    else before the first images. The network must answer there as it did without taps. A frozen network that writes to
    its input gets a copy of it.

    ``compiled`` makes one graph of the network and its taps wherever gradients are wanted, anew for each shape of
    images and number of groups; where that fails it is logged once and the network goes on uncompiled. One whose
    attention is read is not compiled.

    Args:
        module: the network.
        taps: what to read of it; a mapping says for messages who needs each, such as a recipe key.
        frozen: see above.
        batchnorm: of a live network.
        statistics: see above.
        precision: of its convolutions.
        compiled: see above.
        image_shape: channels, height and width of its images.
        name: what it is called in messages.

    Raises:
        RecipeError: the network has not what a tap reads, or it cannot be read with its gradient.
    """

    def __init__(  # noqa: PLR0913 - one value for each sentence above
        self,
        module: nn.Module,
        *,
        taps: Collection[Tap] | Mapping[Tap, str] = frozenset(),
        frozen: bool,
        batchnorm: Literal["running", "batch"] = "running",
        statistics: Literal["stored", "measured"] = "stored",
        precision: torch.dtype = torch.float32,
        compiled: bool = False,
        image_shape: tuple[int, int, int] | None = None,
        name: str = "teacher",
    ) -> None:
        self._taps = dict(taps) if isinstance(taps, Mapping) else dict.fromkeys(taps, "what is asked for")
        self._module = frozen_copy(module) if frozen else module
        self._is_frozen = frozen
        self._batchnorm = batchnorm
        self._precision = precision
        self._name = name
        self._moments_tap = next((tap for tap in MOMENTS if tap in self._taps), None)
        assert frozen or self._moments_tap is None, "moments are taken of a frozen network"
        self._is_measured = statistics == "measured"
        self._measured: tuple[LayerMoments, ...] = ()
        if self._moments_tap is not None and not self._is_measured and not layers_with_statistics(self._module):
            raise RecipeError(
                f"{self._who(self._moments_tap)} needs BatchNorm layers with stored statistics, but the {name} has none"
                f"{_why_none(self._module)}"
            )
        self._trace = MomentsTrace()
        self._attention = AttentionTrace() if Need.ATTENTION in self._taps else None
        self._features: list[Tensor] = []
        self._features_call = -1
        self._layers: dict[str, Tensor] = {}
        for tap in self._taps:
            if isinstance(tap, Layer):
                layer = layer_at(self._module, tap.path, name=name, who=self._who(tap))
                tap_output(layer, tap.path, self._layers, who=self._who(tap))
        self._is_prepared = False
        self._writes_to_input: bool | None = None if frozen else False
        self.is_compiled = compiled
        """Whether it is meant to be compiled, and what is computed along with it."""
        self._network: Callable[[Tensor], Any] = self._module
        if compiled and self._attention is not None:
            logger.warning("%s reads attention, so the %s is not compiled", self._who(Need.ATTENTION), name)
        elif compiled:
            self._network = Compiled(self._module, name=f"the {name}")
        if image_shape is not None:
            self._prepare(image_shape)

    def to(self, device: torch.device) -> ObservedNetwork:
        """Move to ``device``, in place."""
        self._module.to(device)
        if self._is_prepared and self._moments_tap is not None:
            self._trace.attach(self._module)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Weights and statistics of the network in use, by their names in it."""
        return self._module.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take other weights and statistics, in place; a network that is compiled stays so. Not where moments are read.

        Raises:
            RuntimeError: they are of another network.
        """
        assert self._moments_tap is None, "moments are compared with statistics that do not change"
        self._module.load_state_dict(dict(state))

    @property
    def measured(self) -> tuple[LayerMoments, ...]:
        """What ``measure`` has found, a layer each."""
        return self._measured

    def measure(self, batches: Iterable[Tensor]) -> None:
        """Compare moments with those of the images in ``batches`` [N, C, H, W] together from now on."""
        assert self._is_measured, "the layers of measured statistics are watched from the beginning"
        self._measured = ()
        noted = []
        with torch.no_grad():
            for batch in batches:
                if not self._is_prepared:
                    self._prepare(batch.shape[1:])
                noted.append((len(batch), self._observe(self._module, batch, groups=1).moments))
        self._measured = joined_moments(noted)

    def __call__(self, images: Tensor, *, groups: int = 1) -> Observation:
        """Observe ``images`` [N, C, H, W]; moments are taken over ``groups`` equal, contiguous parts of the batch."""
        if not self._is_prepared:
            self._prepare(images.shape[1:])
        device = images.device.type
        gradients = FastInputGradients() if self._is_frozen and device == "cpu" else nullcontext()
        with self._batchnorm_mode(), gradients, self.precision(device):
            observation = self._observe(self._network if torch.is_grad_enabled() else self._module, images, groups)
        if images.requires_grad and torch.is_grad_enabled():
            self._refuse_without_gradient(observation)
        return observation

    def precision(self, device: str) -> torch.autocast:
        """The arithmetic that the network computes in on ``device``, for what computes along with it."""
        return torch.autocast(device, self._precision, self._precision != torch.float32)

    def _observe(self, network: Callable[[Tensor], Any], images: Tensor, groups: int) -> Observation:
        notes: list[LayerMoments] = []
        self._trace.groups, self._trace.notes = groups, notes
        self._features.clear()
        self._layers.clear()
        trace = self._attention
        noting: AbstractContextManager[list[Attention]] = (
            nullcontext([]) if trace is None else trace.noting(len(images))
        )
        try:
            with noting as attention:
                logits = logits_of(self._ask(network, images))
        finally:
            self._trace.notes = None
        observation = Observation(
            logits=logits.float(),
            features=self._features[self._features_call].flatten(1).float() if self._features else None,
            moments=self._beside_measured(notes),
            layers={path: output.float() for path, output in self._layers.items()},
            attention=tuple(attention),
        )
        self._features.clear()
        self._layers.clear()
        return observation

    def _beside_measured(self, notes: Sequence[LayerMoments]) -> tuple[LayerMoments, ...]:
        if not self._measured:
            return tuple(notes)
        if [one.layer for one in notes] != [known.layer for known in self._measured]:
            raise RecipeError(
                f"{self._who(self._moments_tap)} needs the moments of pictures, but these images take another way "
                f"through the {self._name}'s layers than the pictures did; drop it"
            )
        pairs = zip(notes, self._measured, strict=True)
        return tuple(
            replace(one, running_mean=known.running_mean, running_var=known.running_var) for one, known in pairs
        )

    def _ask(self, network: Callable[[Tensor], Any], images: Tensor) -> Any:
        if self._writes_to_input is False:
            return network(images)
        given = images.clone()
        answer = network(given)
        if self._writes_to_input is None:
            self._writes_to_input = not torch.equal(given, images)
        return answer

    def _prepare(self, image_shape: tuple[int, ...] | torch.Size) -> None:
        """Find what the taps read by running the network on two random images, and install them."""
        self._is_prepared = True
        if Need.FEATURES in self._taps or self._moments_tap is not None or self._attention is not None:
            device = next((weight.device for weight in self._module.parameters()), torch.device("cpu"))
            images = torch.randn(2, *image_shape, generator=rng_from(0)).to(device)
            exact = _without_tf32() if device.type == "cuda" else nullcontext()
            with seeded(0, device), torch.autocast(device.type, enabled=False), exact, torch.enable_grad():
                if Need.FEATURES in self._taps:
                    self._tap_features(images)
                if self._moments_tap is not None:
                    self._tap_moments(images)
                if self._attention is not None:
                    self._tap_attention(images, self._attention)
        if self._is_frozen:
            lay_channels_last(self._module)

    def _tap_features(self, images: Tensor) -> None:
        network = wrapped(self._module)
        trial = network if self._is_frozen else frozen_copy(network)
        head = find_head(trial, images)
        if head is None:
            raise RecipeError(
                f"{self._who(Need.FEATURES)} needs the input of a final linear layer, but no linear layer makes the "
                f"logits of the {self._name}; drop it"
            )
        self._features_call = head.call
        tap_input(network.get_submodule(head.path), self._features)

    def _tap_attention(self, images: Tensor, trace: AttentionTrace) -> None:
        with trace.learning_patches():
            self._try_out(images)
        found = self._try_out(images.clone().requires_grad_())
        if not found.attention:
            raise RecipeError(
                f"{self._who(Need.ATTENTION)} needs self-attention over patches, but the {self._name} has none that "
                "can be seen (torch's scaled_dot_product_attention, or a softmax before a matmul); drop it"
            )
        self._refuse_without_gradient(found)

    def _tap_moments(self, images: Tensor) -> None:
        pair = images.clone().requires_grad_()
        layers = dict(layers_with_statistics(self._module))
        watched = self._watched(images) if self._is_measured else ()
        calls: Counter[str] = Counter()
        last: dict[str, tuple[Tensor, Tensor]] = {}

        def counting(path: str) -> Callable[[nn.Module, Any, Any], None]:
            def count(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
                calls[path] += 1
                if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                    last[path] = inputs[0].detach().clone(), output.detach().clone()

            return count

        hooks = [layer.register_forward_hook(counting(path)) for path, layer in layers.items()]
        expected = self._answer(pair)
        for hook in hooks:
            hook.remove()
        self._trace.attach(self._module)
        for layer in watched:
            layer.watch(self._trace)
        found = self._try_out(pair)
        noted = Counter(one.layer for one in found.moments)
        missed = [path for path in layers if noted[path] < calls[path]]
        written_out = [path for path in missed if path in last and normalize_by_kernel(layers[path], *last[path])]
        if written_out:
            found = self._try_out(pair)
        self._refuse_missed(layers, [path for path in missed if path not in written_out], found)
        if not _is_close(found.logits, expected):
            raise RecipeError(
                f"{self._who(self._moments_tap)} needs the moments of BatchNorm layers, but the {self._name} answers "
                "otherwise while they are taken; drop it"
            )
        self._refuse_without_gradient(found)
        if self._moments_tap is not Need.MOMENTS:
            self._refuse_mixed_rows(images)

    def _watched(self, images: Tensor) -> list[Watched]:
        """The layers beside BatchNorm's of which moments are taken."""
        head = find_head(self._module, images)
        watched = watched_layers(self._module, head=None if head is None else head.path)
        if not watched and not layers_with_statistics(self._module):
            raise RecipeError(
                f"{self._who(self._moments_tap)} needs norm layers, convolutions or hidden linear layers, but the "
                f"{self._name} has none that can be seen; drop it"
            )
        return watched

    def _answer(self, images: Tensor) -> Tensor:
        seed_globally(0, images.device)
        return logits_of(self._module(images.clone())).detach().float()

    def _try_out(self, images: Tensor, groups: int = 1) -> Observation:
        seed_globally(0, images.device)
        return self._observe(self._module, images, groups)

    def _refuse_missed(self, layers: Mapping[str, nn.Module], missed: list[str], found: Observation) -> None:
        who = self._who(self._moments_tap)
        if missed:
            layer = layers[missed[0]]
            kind = type(layer).__name__
            others = f" and {len(missed) - 1} more" if len(missed) > 1 else ""
            raise RecipeError(
                f"{who} needs the moments of BatchNorm layers, but the {self._name}'s {missed[0]}{others} is a {kind} "
                "that does not normalise by batch_norm; make it a torch.nn.BatchNorm layer or drop it"
            )
        if not found.moments and self._is_measured:
            raise RecipeError(
                f"{who} needs the moments of layers, but none is met on the way to the answer of the "
                f"{self._name}; drop it"
            )
        if not found.moments:
            raise RecipeError(
                f"{who} needs BatchNorm layers with stored statistics, but none of the {len(layers)} of the "
                f"{self._name} ({next(iter(layers))}, ...) takes part in its answer; drop it"
            )

    def _refuse_mixed_rows(self, images: Tensor) -> None:
        """Refuse a network in which the moments of a class or an image would be those of several.

        Where rows are in the order of the images, two images that change places take their moments along, and these
        are not alike.
        """
        pair = images[:2] * torch.tensor([1.0, 3.0], device=images.device).view(2, 1, 1, 1)
        found, swapped = (self._try_out(batch, groups=2).moments for batch in (pair, pair.flip(0)))
        for first, second in zip(found, swapped, strict=True):
            is_blended = _is_close(first.mean[0], first.mean[1]) and _is_close(first.var[0], first.var[1])
            is_dead = not first.var.any()
            is_swapped = _is_close(first.mean.flip(0), second.mean) and _is_close(first.var.flip(0), second.var)
            if not is_swapped or (is_blended and not is_dead):
                part = "image" if self._moments_tap is Need.IMAGE_MOMENTS else "class"
                raise RecipeError(
                    f"{self._who(self._moments_tap)} needs moments of each {part}, but the rows that the "
                    f"{self._name}'s layer {first.layer} gets are not in the order of the images; take those of the "
                    "whole batch (scope: batch)"
                )

    def _refuse_without_gradient(self, found: Observation) -> None:
        """Refuse what was read where no gradient passes, which would be a constant of the objective."""
        if self._moments_tap is not None:
            blind = [one.layer for one in found.moments if not one.mean.requires_grad]
            if blind:
                raise RecipeError(f"{self._who(self._moments_tap)} {self._without_gradient(blind[0])}")
        if found.features is not None and not found.features.requires_grad:
            raise RecipeError(f"{self._who(Need.FEATURES)} {self._without_gradient('head')}")
        if not all(block.output.requires_grad for block in found.attention):
            raise RecipeError(f"{self._who(Need.ATTENTION)} {self._without_gradient('of attention')}")
        for path, output in found.layers.items():
            if not output.requires_grad:
                raise RecipeError(f"{self._who(Layer(path))} {self._without_gradient(path)}")

    def _without_gradient(self, path: str) -> str:
        return (
            f"needs the gradient of what the {self._name}'s layer {path} gets, and there is none: it is called under "
            "no_grad or torch.utils.checkpoint with use_reentrant=True; take use_reentrant=False"
        )

    def _who(self, tap: Tap | None) -> str:
        return self._taps[tap] if tap is not None else ""

    @contextmanager
    def _batchnorm_mode(self) -> Iterator[None]:
        if self._batchnorm == "batch" or not self._module.training:
            yield
            return
        self._module.eval()
        try:
            yield
        finally:
            self._module.train()


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode whose weights take no gradient."""
    frozen = copy.deepcopy(module).eval()
    for parameter in frozen.parameters():  # TorchScript modules have no requires_grad_, and copies that are no leaves
        parameter.detach_().requires_grad_(False)
    return frozen


def _why_none(network: nn.Module) -> str:
    is_script = any(isinstance(layer, torch.jit.ScriptModule) for layer in network.modules())
    if is_script:
        return " that can be seen, because it is TorchScript; give the Python module or drop it"
    return "; drop it, or name a folder of about 100 real pictures in synthesis.statistics"


def _is_close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same to rounding; what is not finite is somebody else's concern."""
    scale = other.norm()
    return not scale.isfinite() or bool((one - other).norm() <= 1e-3 * scale + 1e-5)


def _without_tf32() -> AbstractContextManager[None]:
    """Convolutions in all of float32: in TF32 an answer differs from itself by more than what is looked for."""
    cudnn = torch.backends.cudnn
    return cudnn.flags(
        enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
    )
