"""Networks and sizes whose synthesis is measured."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from raydfkd.config.recipe import Recipe
from raydfkd.errors import RecipeError, did_you_mean
from raydfkd.networks.build import build_network


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A teacher with random weights, on which speed does not depend, and the batches that are made of it."""

    network: str
    """Name of the network as in a recipe."""
    channels: int = 3
    size: int
    """Height and width of the images in pixels."""
    classes: int
    """Outputs of the teacher; a batch holds as many of them as divide it evenly."""
    cuda_batch: int
    """Images of a batch on CUDA."""
    cpu_batch: int
    """Images of a batch on CPU, where a step with more would take minutes."""
    cpu_steps: int = 6
    """Steps of our loop in one round on CPU."""
    is_quick: bool = True
    """Whether it is measured on CPU without being asked for."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keywords of the network's constructor."""

    def batch(self, device: torch.device) -> int:
        """Images of a batch."""
        return self.cuda_batch if device.type == "cuda" else self.cpu_batch

    def steps(self, device: torch.device) -> int:
        """Steps of our loop in one round, enough that what is done once a batch hardly counts."""
        return 200 if device.type == "cuda" else self.cpu_steps


CASES: dict[str, Case] = {
    "convnet-32": Case(network="convnet", channels=1, size=32, classes=10, cuda_batch=100, cpu_batch=100, cpu_steps=10),
    "resnet20-32": Case(
        network="resnet_small", channels=1, size=32, classes=8, cuda_batch=64, cpu_batch=64, cpu_steps=10
    ),
    "resnet34-32": Case(
        network="raydfkd.bench.cases:resnet34_32", size=32, classes=10, cuda_batch=256, cpu_batch=64, is_quick=False
    ),
    "resnet18-224": Case(network="torchvision:resnet18", size=224, classes=1000, cuda_batch=128, cpu_batch=8),
    "resnet50-224": Case(
        network="torchvision:resnet50", size=224, classes=1000, cuda_batch=128, cpu_batch=8, is_quick=False
    ),
    "efficientnet-lite0-224": Case(
        network="timm.models.efficientnet:tf_efficientnet_lite0",
        size=224,
        classes=1000,
        cuda_batch=128,
        cpu_batch=8,
        options={"num_classes": 1000},
    ),
}


def resnet34_32() -> nn.Module:
    """ResNet-34 for 10 classes of 32-pixel images: a 3x3 stem of stride 1 and no max pooling."""
    from torchvision.models.resnet import BasicBlock, ResNet

    network: nn.Module = ResNet(BasicBlock, [3, 4, 6, 3], num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


def choose_cases(wanted: tuple[str, ...], device: torch.device) -> dict[str, Case]:
    """The cases called ``wanted``; without any, those that ``device`` measures in a few minutes.

    Raises:
        RecipeError: no such case.
    """
    for name in wanted:
        if name not in CASES:
            raise RecipeError(f"--case {name}: no such case; {did_you_mean(name, CASES)}")
    if wanted:
        return {name: CASES[name] for name in wanted}
    return {name: case for name, case in CASES.items() if case.is_quick or device.type == "cuda"}


def missing_package(case: Case) -> str | None:
    """The package that ``case`` needs and that is not installed."""
    package, colon, _ = case.network.partition(":")
    root = package.partition(".")[0]
    return root if colon and importlib.util.find_spec(root) is None else None


def recipe_of(case: Case, device: torch.device, *, precision: str) -> Recipe:
    """DeepInversion of ``case``, one stage as long as a round."""
    return Recipe.model_validate(
        {
            "name": "bench",
            "teacher": {
                "network": case.network,
                "options": case.options,
                "classes": case.classes,
                "weights": "random",
                "image_space": {
                    "channels": case.channels,
                    "size": case.size,
                    "mean": (0.5,) * case.channels,
                    "std": (0.25,) * case.channels,
                },
            },
            "student": {"network": "convnet"},
            "synthesis": {
                "synthesizer": "pixels",
                "batch_size": case.batch(device),
                "stages": [{"steps": case.steps(device)}],
                "precision": precision,
                "augment": ({"kind": "jitter", "pixels": 2},),
                "objective": (
                    {"term": "cross_entropy"},
                    {"term": "bn_moments"},
                    {"term": "total_variation", "weight": 1e-3},
                    {"term": "image_l2", "weight": 1e-5},
                ),
            },
            "transfer_set": {"images_per_class": 1, "unit": {"classes": 1, "images_per_class": 1}},
            "distill": {"steps": 1, "criterion": "soft_kl", "optimizer": {"lr": 1e-3}},
        }
    )


@torch.no_grad()
def build_teacher(recipe: Recipe, device: torch.device) -> nn.Module:
    """The recipe's teacher in eval mode; its untrained BatchNorm layers get statistics of a plausible size."""
    teacher = build_network(recipe.teacher, recipe.teacher, where="teacher", seed=0).to(device).train()
    for layer in teacher.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # averages all batches alike
    for _ in range(4):
        teacher(torch.randn(16, *recipe.teacher.image_space.shape, device=device))
    return teacher.eval()
