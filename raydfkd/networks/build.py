"""Networks by name: small ones, torchvision's, any ``module:callable``."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from raydfkd.config.registry import Registry
from raydfkd.config.schema import ImageSpace, StudentSpec, TeacherSpec
from raydfkd.errors import RecipeError, did_you_mean

NETWORKS: Registry[nn.Module] = Registry("network", ["raydfkd.networks.small"], member="forward")
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)
"""What networks raise on images of a size or channel count that they cannot take."""


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
            f"teacher.image_space.size is {space.size_text}, but {where}.network {name} cannot take {space.channels}x"
            f"{space.height}x{space.width} images ({reason}); {remedy}"
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
            return network(torch.zeros(2, space.channels, size or space.height, size or space.width))
    finally:
        network.train(training)


def _takes(network: nn.Module, space: ImageSpace, size: int) -> bool:
    try:
        _blank_logits(network, space, size)
    except REFUSALS:
        return False
    return True


def planned_parameters(spec: TeacherSpec | StudentSpec, teacher: TeacherSpec, *, where: str) -> int:
    """Number of weights of a network that can be built; those of this package and of torchvision take no memory."""
    is_ours = ":" not in spec.network or (spec.network.startswith("torchvision:") and "weights" not in spec.options)
    with torch.random.fork_rng(devices=[]), torch.device("meta" if is_ours else "cpu"):
        return count_parameters(_construct(spec, teacher, where))


def count_parameters(network: nn.Module) -> int:
    """Number of weights."""
    return sum(parameter.numel() for parameter in network.parameters())
