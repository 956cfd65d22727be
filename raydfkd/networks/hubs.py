"""Libraries of networks, hubs and archives, one class each: what they have, build, and know of a network.

A network with weights of its own, which its library publishes or which are in its archive, is built with them.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from typing_extensions import override

from raydfkd.config.load import expand_home
from raydfkd.config.schema import IMAGENET_MEAN, IMAGENET_STD
from raydfkd.errors import MissingError, RecipeError, did_you_mean, one_line

Description = dict[str, Any]
"""What is known of a network, in the keys of a recipe: ``classes``, ``class_names``, ``image_space``, or fewer."""


class Library(Protocol):
    """A family of networks that are given as ``family:name``."""

    def check(self, name: str, where: str) -> None:
        """Raise RecipeError where there is no such network, as far as that can be told without making it."""

    def build(self, name: str, options: Mapping[str, Any], *, classes: int, channels: int, own: str) -> Any:
        """The network; with its own weights called ``own`` where that is not empty.

        May raise anything, which becomes the user's line.
        """

    def describe(self, name: str, options: Mapping[str, Any], *, own: str) -> Description:
        """What is known of the network and of its own weights without the weights; empty for none."""


class Torchvision(Library):
    """Networks of torchvision, with the weights that it publishes."""

    @override
    def check(self, name: str, where: str) -> None:
        known = _models().list_models()
        if name not in known:
            raise RecipeError(f"{where}.network: torchvision has no {name!r}; {did_you_mean(name, known)}")

    @override
    def build(self, name: str, options: Mapping[str, Any], *, classes: int, channels: int, own: str) -> Any:
        if not own:
            return _models().get_model(name, **{"num_classes": classes, **options})
        weights = self._weights(name, own)
        refuse_other_count(f"torchvision:{name}", len(weights.meta.get("categories", range(classes))), classes)
        return _models().get_model(name, weights=weights, progress=False, **options)

    @override
    def describe(self, name: str, options: Mapping[str, Any], *, own: str) -> Description:
        weights = self._weights(name, own or "DEFAULT")
        preset = weights.transforms()
        found: Description = {}
        if own and "categories" in weights.meta:
            found["classes"] = len(weights.meta["categories"])
            found["class_names"] = list(weights.meta["categories"])
        if hasattr(preset, "crop_size") and hasattr(preset, "mean"):
            size = options.get("image_size", preset.crop_size[0])
            found["image_space"] = space_of(size, preset.mean, preset.std)
        return found

    def _weights(self, name: str, own: str) -> Any:
        enumeration = _models().get_model_weights(name)
        if own in ("pretrained", "DEFAULT"):
            return enumeration.DEFAULT
        known = [weights.name for weights in enumeration]
        if own not in known:
            raise RecipeError(
                f"teacher.weights is {own!r}, and torchvision:{name} has no such weights; {did_you_mean(own, known)}"
            )
        return enumeration[own]


def _models() -> Any:
    from torchvision import models

    return models


class Timm(Library):
    """Networks of timm, of its hub (`hf-hub:REPO`), or that it has saved (`local-dir:FOLDER`)."""

    _USUAL: Mapping[str, Any] = {
        "input_size": (3, 224, 224),
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    }
    """Of networks that timm has no weights of."""

    @override
    def check(self, name: str, where: str) -> None:
        timm = import_extra("timm", "timm", f"{where}.network")
        if ":" in name:  # hf-hub:REPO and local-dir:FOLDER, which timm itself reads
            return
        architecture = name.partition(".")[0]
        if not timm.is_model(architecture):
            known = timm.list_models()
            raise RecipeError(f"{where}.network: timm has no {name!r}; {did_you_mean(architecture, known)}")
        tags = [model.partition(".")[2] for model in timm.list_pretrained(f"{architecture}.*")]
        if "." in name and name.partition(".")[2] not in tags:
            remedy = did_you_mean(name.partition(".")[2], tags) if tags else f"use timm:{architecture}"
            raise RecipeError(f"{where}.network: timm has no weights {name!r}; {remedy}")

    @override
    def build(self, name: str, options: Mapping[str, Any], *, classes: int, channels: int, own: str) -> Any:
        import timm

        if own:
            refuse_other_count(f"timm:{name}", self._configuration(name).get("num_classes", classes), classes)
        sizes = {"num_classes": classes, "in_chans": channels}
        return timm.create_model(name, pretrained=bool(own), **{**sizes, **options})

    @override
    def describe(self, name: str, options: Mapping[str, Any], *, own: str) -> Description:
        configuration = self._configuration(name)
        channels, height, width = configuration["input_size"]
        size = options.get("img_size", [height, width])
        found: Description = {"image_space": space_of(size, configuration["mean"], configuration["std"])}
        if len(found["image_space"]["mean"]) != channels:
            found["image_space"] |= {key: list(configuration[key]) * channels for key in ("mean", "std")}
        if own:
            found["classes"] = configuration["num_classes"]
            names = self._class_names(configuration)
            if len(names) == found["classes"]:
                found["class_names"] = names
        return found

    def _configuration(self, name: str) -> Mapping[str, Any]:
        import timm

        kind, colon, place = name.partition(":")
        if kind == "local-dir":
            read = json.loads((Path(expand_home(place)) / "config.json").read_text(encoding="utf-8"))
            found = {**read, **read.get("pretrained_cfg", {})}
        elif colon:
            found = dict(timm.models.load_model_config_from_hf(place)[0])
        else:
            configuration = timm.get_pretrained_cfg(name, allow_unregistered=False)
            found = {} if configuration is None else dict(configuration.to_dict())
        return {**self._USUAL, **found}

    def _class_names(self, configuration: Mapping[str, Any]) -> list[str]:
        if configuration.get("label_names"):
            return [str(name) for name in configuration["label_names"]]
        return list(imagenet_names(configuration["num_classes"]))


@cache
def imagenet_names(classes: int) -> tuple[str, ...]:
    """Names of the classes of ImageNet, or of the part of it that has so many; none where timm knows no such part.

    They take timm a while to read.
    """
    import timm

    subset = timm.data.infer_imagenet_subset({"num_classes": classes})
    if subset is None:
        return ()
    info = timm.data.ImageNetInfo(subset)
    return tuple(info.index_to_description(label) for label in range(info.num_classes()))


class Transformers(Library):
    """Image classifiers of transformers: of the hub, or in a folder that `save_pretrained` wrote."""

    @override
    def check(self, name: str, where: str) -> None:
        import_extra("transformers", "hf", f"{where}.network")
        folder = expand_home(name)
        if (folder.startswith(("/", ".")) or folder.count("/") > 1) and not Path(folder).is_dir():
            raise MissingError(f"{where}.network is 'hf:{name}': no such folder; give one that save_pretrained wrote")

    @override
    def build(self, name: str, options: Mapping[str, Any], *, classes: int, channels: int, own: str) -> Any:
        from transformers import AutoModelForImageClassification

        configuration = self._configuration(name, options)
        if own:
            refuse_other_count(f"hf:{name}", configuration.num_labels, classes)
            return AutoModelForImageClassification.from_pretrained(expand_home(name), config=configuration)
        if configuration.num_labels != classes:
            configuration.num_labels = classes
        return AutoModelForImageClassification.from_config(configuration)

    @override
    def describe(self, name: str, options: Mapping[str, Any], *, own: str) -> Description:
        configuration, images = self._configuration(name, options), self._preprocessor(name)
        found: Description = {"classes": configuration.num_labels}
        names = [configuration.id2label.get(label, "") for label in range(configuration.num_labels)]
        if not all(name == f"LABEL_{label}" for label, name in enumerate(names)):
            found["class_names"] = [name or str(label) for label, name in enumerate(names)]
        channels = getattr(configuration, "num_channels", 3)
        size = getattr(configuration, "image_size", None) or self._edges(images)
        if size is not None:
            mean, std = self._constants(images, channels)
            found["image_space"] = space_of(size, mean, std)
        return found

    def _configuration(self, name: str, options: Mapping[str, Any]) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(expand_home(name), **options)

    def _preprocessor(self, name: str) -> Mapping[str, Any]:
        from transformers.image_processing_base import ImageProcessingMixin

        try:
            return dict(ImageProcessingMixin.get_image_processor_dict(expand_home(name))[0])
        except OSError:  # what it raises where there is no such file
            return {}

    def _edges(self, images: Mapping[str, Any]) -> Any:
        size = images.get("crop_size") if images.get("do_center_crop") else None
        size = size or images.get("size")
        if isinstance(size, Mapping):
            return [size["height"], size["width"]] if "height" in size else size.get("shortest_edge")
        return size

    def _constants(self, images: Mapping[str, Any], channels: int) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of images in [0, 1]."""
        if not images.get("do_normalize", bool(images)):
            mean, std = [0.0], [1.0]
        else:
            mean, std = images.get("image_mean", [0.5]), images.get("image_std", [0.5])
        mean, std = ([value] if isinstance(value, int | float) else value for value in (mean, std))
        mean, std = ([*value] * (channels if len(value) == 1 else 1) for value in (mean, std))
        if images.get("do_rescale", True):  # then they are of images in [0, 1], else of bytes
            return mean, std
        return [value / 255 for value in mean], [value / 255 for value in std]


class TorchHub(Library):
    """Entries of a repository of torch.hub, or of a clone of it: `REPO:NAME`."""

    @override
    def check(self, name: str, where: str) -> None:
        if not name.rpartition(":")[0]:
            raise RecipeError(f"{where}.network is 'torchhub:{name}'; write it as torchhub:REPO:NAME")

    @override
    def build(self, name: str, options: Mapping[str, Any], *, classes: int, channels: int, own: str) -> Any:
        repository, _, entry = name.rpartition(":")
        folder = expand_home(repository)
        source = "local" if Path(folder).is_dir() else "github"
        if own and not options.keys() & {"pretrained", "weights"}:
            options = {"pretrained": True, **options}
        return torch.hub.load(folder, entry, source=source, trust_repo=True, verbose=False, **options)

    @override
    def describe(self, name: str, options: Mapping[str, Any], *, own: str) -> Description:
        return {}


class Archive(Library):
    """Networks in one file with their weights."""

    def __init__(self, family: str, read: Callable[[str], Any]) -> None:
        self._family, self._read = family, read

    @override
    def check(self, name: str, where: str) -> None:
        if not Path(expand_home(name)).is_file():
            raise MissingError(f"{where}.network is '{self._family}:{name}': no such file")

    @override
    def build(self, name: str, options: Mapping[str, Any], *, classes: int, channels: int, own: str) -> Any:
        if options:
            raise ValueError("an archive takes no options")
        return self._read(expand_home(name))

    @override
    def describe(self, name: str, options: Mapping[str, Any], *, own: str) -> Description:
        return {}


def import_extra(package: str, extra: str, where: str) -> Any:
    """Import an optional ``package``.

    Raises:
        MissingError: it is not installed; says which ``extra`` installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingError(
            f"{where} needs {package}, which is not installed ({one_line(error)}); pip install 'raydfkd[{extra}]'"
        ) from error


def refuse_other_count(network: str, known: int, classes: int) -> None:
    """Raise RecipeError where a recipe's classes are not those that published weights know."""
    if known != classes:
        raise RecipeError(
            f"teacher.classes is {classes}, but the weights of {network} are for {known} classes; use that, or give "
            "teacher.weights as a file of yours"
        )


def space_of(size: Any, mean: Any, std: Any) -> Description:
    """An image space in the keys of a recipe; ``size`` is an edge, or height and width."""
    edges = [int(size)] if isinstance(size, int | float) else [int(edge) for edge in size]
    square = len(set(edges)) == 1
    return {
        "channels": len(mean),
        "size": edges[0] if square else edges,
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
    }
