"""Networks by name: small ones, torchvision's, any ``module:callable``."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import PurePosixPath
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from raydfkd.config.registry import Registry, import_callable
from raydfkd.config.schema import ImageSpace, StudentSpec, TeacherSpec, is_own
from raydfkd.errors import MissingError, RecipeError, one_line
from raydfkd.networks.answers import AnswerScale, AnswersLogits, NoLogitsError, logits_of, scale_of
from raydfkd.networks.hubs import Library
from raydfkd.networks.libraries import hub_hint, library_of, needs_permission
from raydfkd.networks.taps import wrapped
from raydfkd.seeds import rng_from, seeded

NETWORKS: Registry[nn.Module] = Registry(
    "network", ["raydfkd.networks.small", "raydfkd.networks.families", "raydfkd.networks.pruned"], member="forward"
)
PRUNED_TEACHER = "pruned_teacher"
"""The one network that is made of another, the teacher (networks/pruned)."""
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)
"""What networks raise on images of a size or channel count that they cannot take."""

Factory = Callable[[], nn.Module]


def build_network(spec: TeacherSpec | StudentSpec, teacher: TeacherSpec, *, where: str, seed: int) -> nn.Module:
    """Build a network with weights drawn from ``seed`` and try it on two images of the teacher's image space.

    It is on the CPU, in float32, and answers logits [N, K] whatever its author had it answer; :mod:`answers` says how.

    Raises:
        RecipeError: unknown name, wrong options, code that fails, an image size or class count that does not fit.
    """
    network = construct_network(spec, teacher, where=where, seed=seed)
    with seeded(seed):
        images, answer, logits = _Trial(network, spec.network, teacher, where).run()
        scale = _scale(network, spec, where, images, answer, logits)
    temperature = spec.temperature if isinstance(spec, TeacherSpec) else 1.0
    network.register_forward_hook(AnswersLogits(classes=teacher.classes, scale=scale, temperature=temperature))
    return network


def construct_network(spec: TeacherSpec | StudentSpec, teacher: TeacherSpec, *, where: str, seed: int) -> nn.Module:
    """The network with weights drawn from ``seed``, on the CPU, in float32; it answers what its author had it answer.

    Raises:
        RecipeError: unknown name, wrong options, code that fails.
    """
    factory = _factory_of(spec, teacher, where)
    with seeded(seed):
        network = _plain(factory()).cpu().float()
    packed = next((key for key, value in network.state_dict().items() if not isinstance(value, Tensor)), None)
    if packed is not None:
        raise RecipeError(
            f"{where}.network {spec.network} has packed weights ({packed}), as quantised layers do, which have no "
            "gradient; give the network as it was before"
        )
    return network


def _scale(  # noqa: PLR0913 - one trial of a network
    network: nn.Module, spec: TeacherSpec | StudentSpec, where: str, images: Tensor, answer: Any, logits: Tensor
) -> AnswerScale:
    """What the network answers: as the recipe says, or as two images show.

    Raises:
        RecipeError: it cannot be what the recipe says, or is a sigmoid for each class, which networks for several
            labels an image have.
    """
    if isinstance(spec, TeacherSpec) and spec.output is not None:
        declared = AnswerScale(spec.output)
        low, high = float(logits.min()), float(logits.max())
        if not declared.holds(low, high):
            raise RecipeError(
                f"teacher.output is {spec.output!r}, but {spec.network}'s answer to two random images goes from "
                f"{low:.3g} to {high:.3g}; leave it out, and it is found"
            )
        return declared
    scale = scale_of(network, images, answer, logits)
    if scale is AnswerScale.SIGMOIDS and logits.shape[1] > 2 and isinstance(spec, TeacherSpec):
        raise RecipeError(
            f"{where}.network {spec.network} answers a sigmoid for each class, as networks for several labels an image "
            f"do, and classes must exclude each other here; if they do, set {where}.output: sigmoid"
        )
    return scale


def _factory_of(spec: TeacherSpec | StudentSpec, teacher: TeacherSpec, where: str) -> Factory:
    """What constructs the network; modules are imported here, before any random number is drawn for weights."""
    name = as_module(spec.network)
    family, colon, member = name.partition(":")
    if not colon:
        _refuse_dots(name, where)
        NETWORKS.get(name, where=f"{where}.network")
        if name == PRUNED_TEACHER:
            return _pruned(spec, teacher, where)
        supplied = (teacher.classes, teacher.image_space.channels)
        return lambda: NETWORKS.build(name, spec.options, *supplied, where=f"{where}.options")
    library = library_of(name, where)
    if library is not None:
        return _from_library(library[0], member, spec, teacher, where)
    try:
        found = import_callable(name, where=f"{where}.network")
    except SystemExit as error:  # a script that parses arguments when it is imported
        raise RecipeError(
            f"{where}.network is {name!r}, whose module ends the process ({error}) when imported"
        ) from None
    return lambda: _call(lambda: found(**spec.options), spec, where)


def _pruned(spec: TeacherSpec | StudentSpec, teacher: TeacherSpec, where: str) -> Factory:
    if not isinstance(spec, StudentSpec):
        raise RecipeError(
            f"{where}.network is {PRUNED_TEACHER!r}, which is made of the teacher and can only be the student; "
            "name another network"
        )
    whole = _factory_of(teacher, teacher, "teacher")
    return lambda: prune_teacher(spec, _plain(whole()).cpu().float(), teacher)


def prune_teacher(spec: StudentSpec, network: nn.Module, teacher: TeacherSpec) -> nn.Module:
    """The student ``spec`` of a teacher's ``network``, whose weights it has.

    Raises:
        RecipeError: the network's layers cannot be told apart.
    """
    supplied = (network, teacher.classes, teacher.image_space.shape)
    return NETWORKS.build(spec.network, spec.options, *supplied, where="student.options")


def _from_library(
    library: Library, name: str, spec: TeacherSpec | StudentSpec, teacher: TeacherSpec, where: str
) -> Factory:
    family = spec.network.partition(":")[0]
    if isinstance(spec, TeacherSpec) and needs_permission(family, name) and not spec.allow_code:
        raise RecipeError(
            f"{where}.network is {spec.network!r}, which brings code of its own that will run here; "
            f"set {where}.allow_code: true if you trust it"
        )
    own = spec.weights if isinstance(spec, TeacherSpec) and is_own(spec.weights) else ""
    sizes = {"classes": teacher.classes, "channels": teacher.image_space.channels}
    return lambda: _call(lambda: library.build(name, spec.options, **sizes, own=own), spec, where)


def as_module(name: str) -> str:
    """The network ``./models/nets.py:small`` as what it imports, ``models.nets:small``; anything else as it is."""
    path, colon, member = name.partition(":")
    if not colon or not path.endswith(".py"):
        return name
    parts = PurePosixPath(path).with_suffix("").parts
    return name if path.startswith("/") or ".." in parts else f"{'.'.join(parts)}:{member}"


def _refuse_dots(name: str, where: str) -> None:
    module, dot, member = name.rpartition(".")
    if dot and name not in NETWORKS.names():
        raise RecipeError(
            f"{where}.network is {name!r}, and no network has that name; one of your own is module:callable, "
            f"such as {module}:{member}"
        )


def _call(factory: Callable[[], Any], spec: TeacherSpec | StudentSpec, where: str) -> nn.Module:
    try:
        network = factory()
    except RecipeError:
        raise
    except (Exception, SystemExit) as error:  # code of the user's may raise anything
        reason = one_line(error)
        if isinstance(error, TypeError) and _SIGNATURE.search(reason):
            raise RecipeError(f"{where}.options do not suit {spec.network}: {reason}") from error
        kind = "" if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: "
        given = f" with options {spec.options}" if spec.options else ""
        is_out_of_reach = isinstance(error, OSError)
        hint = hub_hint(spec.network) if is_out_of_reach else ""
        refuse = MissingError if is_out_of_reach else RecipeError
        raise refuse(f"{where}.network {spec.network} cannot be built{given}: {kind}{reason}{hint}") from error
    if isinstance(network, torch.export.ExportedProgram):
        return network.module()
    if not isinstance(network, nn.Module):
        raise RecipeError(f"{where}.network: {spec.network} returned {type(network).__name__}, not a torch.nn.Module")
    return network


_SIGNATURE = re.compile(r"unexpected keyword argument|missing \d+ required|positional argument|multiple values for")


def _plain(network: nn.Module) -> nn.Module:
    """The network that a wrapper for data parallelism holds, as a module that takes hooks and either of its modes."""
    network = wrapped(network)
    if isinstance(network, torch.jit.ScriptModule):
        return _Scripted(network)
    if isinstance(network, torch.fx.GraphModule) and hasattr(network, "_guards_fn"):
        for name in ("train", "eval"):  # an exported graph has the mode that it was exported in
            setattr(network, name, MethodType(_keep_mode, network))
    return network


class _Scripted(nn.Module):
    """A TorchScript module inside one that takes hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Any:
        """What the module answers."""
        return self.module(images)


def _keep_mode(self: nn.Module, mode: bool = False) -> nn.Module:
    return self


class _Trial:
    """Runs a network on two images and explains what goes wrong."""

    def __init__(self, network: nn.Module, name: str, teacher: TeacherSpec, where: str) -> None:
        self._network, self._teacher = network, teacher
        self._name = f"{where}.network {name}"

    def run(self) -> tuple[Tensor, Any, Tensor]:
        """Two images, the answer to them, and the logits [2, K] in it.

        Raises:
            RecipeError: there is none, or it holds none.
        """
        space, classes = self._teacher.image_space, self._teacher.classes
        try:
            images = self._images(space.height, space.width, 2)
            answer = self._answer(images)
        except Exception as error:  # noqa: BLE001 - code of the user's may raise anything
            raise self._refusal(space, error) from error
        try:
            return images, answer, logits_of(answer, classes, images=2)
        except NoLogitsError as error:
            single = "; for two classes one number an image will do" if str(error) == "[2, 1]" else ""
            raise RecipeError(
                f"teacher.classes is {classes}, but {self._name} answers {error} for 2 images; "
                f"it must be [2, {classes}]{single}"
            ) from None

    def _images(self, height: int, width: int, count: int) -> Tensor:
        shape = (count, self._teacher.image_space.channels, height, width)
        return torch.randn(shape, generator=rng_from(0))

    def _answer(self, images: Tensor) -> Any:
        training = self._network.training
        self._network.eval()
        try:
            with torch.no_grad():
                return self._network(images.clone())
        finally:
            self._network.train(training)

    def _works(self, height: int, width: int, images: int = 2) -> bool:
        try:
            logits_of(self._answer(self._images(height, width, images)), self._teacher.classes, images=images)
        except Exception:  # noqa: BLE001 - code of the user's may raise anything
            return False
        return True

    def _refusal(self, space: ImageSpace, error: Exception) -> RecipeError:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        shape = f"{space.channels}x{space.height}x{space.width}"
        sizes = [size for size in (28, 32, 64, 96, 112, 128, 224, 256, 299) if self._works(size, size)]
        if sizes:
            return RecipeError(
                f"teacher.image_space.size is {space.size_text}, but {self._name} cannot take {shape} images "
                f"({reason}); sizes that work: {', '.join(map(str, sizes))}"
            )
        counts = [
            count for count in (1, 4, 8, 16, 32, 64, 100, 128, 256) if self._works(space.height, space.width, count)
        ]
        if counts:
            return RecipeError(
                f"{self._name} takes batches of {counts[0]} images, but not of 2 ({reason}); its forward must not fix "
                "the size of the batch"
            )
        if not isinstance(error, REFUSALS) or isinstance(error, (NotImplementedError, TypeError)):
            return RecipeError(
                f"{self._name} cannot be called with images [2, {shape.replace('x', ', ')}] alone "
                f"({type(error).__name__}: {reason}); give one whose forward takes them"
            )
        return RecipeError(f"{self._name} cannot take {shape} images ({reason}); check channels and network")


def count_parameters(network: nn.Module) -> int:
    """Number of weights."""
    return sum(parameter.numel() for parameter in network.parameters())
