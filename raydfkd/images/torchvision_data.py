"""Classification data sets of torchvision."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from raydfkd.config.schema import ImageSpace
from raydfkd.errors import RecipeError, did_you_mean, one_line
from raydfkd.images.classes import ClassMap, Matching
from raydfkd.images.folders import Crop
from raydfkd.images.pictures import BrokenPictureError, check_channels, read_picture
from raydfkd.images.real_data import REAL_DATA, RealData, Split
from raydfkd.images.streams import Picture, PictureStream


@dataclass(frozen=True, slots=True)
class _Part:
    """A split as torchvision is asked for it, and every tenth picture of it left out or alone."""

    arguments: Mapping[str, Any]
    tenths: tuple[int, ...] = field(default=tuple(range(10)))
    """Pictures that belong to it, by the last digit of their number."""


_Parts = Mapping[Split, _Part]


def _held_out(train: Mapping[str, Any], test: Mapping[str, Any]) -> _Parts:
    """Of a set without a validation split: every tenth picture of training."""
    return {"train": _Part(train, tuple(range(9))), "validation": _Part(train, (9,)), "test": _Part(test)}


def _called(train: str, validation: str, test: str) -> _Parts:
    names: Mapping[Split, str] = {"train": train, "validation": validation, "test": test}
    return {split: _Part({"split": name}) for split, name in names.items()}


_BY_FLAG = _held_out({"train": True}, {"train": False})
_BY_NAME = _held_out({"split": "train"}, {"split": "test"})
_UNDIVIDED: _Parts = {"train": _Part({}, tuple(range(8))), "validation": _Part({}, (8,)), "test": _Part({}, (9,))}
SETS: Mapping[str, _Parts] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "USPS"), _BY_FLAG),
    **dict.fromkeys(("Food101", "GTSRB", "STL10", "SVHN", "StanfordCars"), _BY_NAME),
    **dict.fromkeys(("DTD", "FGVCAircraft", "Flowers102", "PCAM", "RenderedSST2"), _called("train", "val", "test")),
    **dict.fromkeys(("ImageNet", "Imagenette"), _held_out({"split": "train"}, {"split": "val"})),
    **dict.fromkeys(("EuroSAT", "SUN397"), _UNDIVIDED),
    "Country211": _called("train", "valid", "test"),
    "OxfordIIITPet": _held_out({"split": "trainval"}, {"split": "test"}),
}
"""Data sets of torchvision with one label a picture, and their splits."""
_NUMBERED: Mapping[str, int] = {"GTSRB": 43, "PCAM": 2, "SVHN": 10, "USPS": 10}
"""Classes of those that have no names."""


@REAL_DATA.form("torchvision")
def torchvision_data(name: str, where: str) -> Callable[..., RealData]:
    """The function that opens torchvision's data set ``name``.

    Raises:
        RecipeError: it has no such set for classification.
    """
    if name not in SETS:
        raise RecipeError(f"{where}: torchvision has no classification data set {name!r}; {did_you_mean(name, SETS)}")

    def opened(
        space: ImageSpace, *, root: str, download: bool = False, classes: ClassMap = (), crop: Crop = 1.0
    ) -> RealData:
        """A classification data set of torchvision, read from `root` as torchvision lays it out there.

        Where it has no validation split, that is every tenth picture of the training split.

        Args:
            root: folder of its files, as torchvision's own argument.
            download: fetch them where they are missing, if torchvision can.
            classes: the teacher's classes by name of one of the set's, or these names in the teacher's order.
            crop: share of the edge that is kept of a picture once it is scaled.
        """
        check_channels(space)
        parts = SETS[name]

        def load(split: Split) -> PictureStream:
            part = parts[split]
            data = _construct(name, root, part.arguments, download=download)

            def pictures() -> Iterator[Picture]:
                for number in range(len(data)):
                    if number % 10 in part.tenths:
                        yield Picture(f"number {number} of {name}", partial(_read, data, number, space, crop))

            return PictureStream(pictures)

        found = _construct(name, root, parts["test"].arguments, download=download)
        return RealData(
            class_names=_class_names(name, found),
            channels=space.channels,
            load=load,
            matching=Matching(what=f"class of {name}", given=classes, is_sorted=False),
        )

    return opened


def _construct(name: str, root: str, arguments: Mapping[str, Any], *, download: bool) -> Any:
    from torchvision import datasets

    factory = getattr(datasets, name)
    if "download" in inspect.signature(factory).parameters:
        arguments = {**arguments, "download": download}
    try:
        return factory(root, **arguments)
    except ImportError as error:
        raise RecipeError(f"real_data: {name} of torchvision needs {error.name}; pip install {error.name}") from error
    except Exception as error:  # missing, torn and foreign files, a network that is down: each set has its own words
        reason = one_line(error).partition(". You can")[0].rstrip(".")
        if download and "download" in arguments:
            raise RecipeError(
                f"real_data.root is {root!r}: torchvision cannot fetch {name} there ({reason}); try again later, or "
                "bring its files from elsewhere"
            ) from error
        fetched = ", or real_data.download=true" if "download" in arguments else ""
        raise RecipeError(
            f"real_data.root is {root!r}: {name} cannot be opened there ({reason}); give the folder that "
            f"torchvision has it in{fetched}"
        ) from error


def _class_names(name: str, data: Any) -> tuple[str, ...]:
    if name in _NUMBERED:
        return tuple(map(str, range(_NUMBERED[name])))
    return tuple(names if isinstance(names, str) else ", ".join(names) for names in data.classes)


def _read(data: Any, number: int, space: ImageSpace, crop: float) -> tuple[Tensor, int]:
    try:
        picture, label = data[number]
    except (OSError, SyntaxError, ValueError) as error:  # of the decoder, where the set opens files itself
        raise BrokenPictureError(one_line(error)) from error
    return read_picture(picture, space, crop=crop), int(label)
