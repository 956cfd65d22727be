"""Pictures in folders: a folder for each class, or all in one beside a file of their labels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from sys import intern
from typing import Annotated
from zlib import crc32

from pydantic import Field
from torch import Tensor

from raydfkd.config.schema import ImageSpace
from raydfkd.errors import RecipeError, read_text
from raydfkd.images.classes import ClassMap, Matching
from raydfkd.images.pictures import check_channels, is_picture, pictures_in, read_picture
from raydfkd.images.real_data import REAL_DATA, SPLITS, RealData, Split
from raydfkd.images.streams import Picture, PictureStream

Crop = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
SPLIT_NAMES: Mapping[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}
"""Names that the splits of a data set usually have."""
Entry = tuple[Path, str]
"""A picture and the name of its class."""


def usual_splits(names: Iterable[str], given: Mapping[Split, str], *, where: str) -> dict[Split, str]:
    """Which of the ``names`` is which split: as ``given``, else by the usual names.

    Where nothing is called test, the validation split judges as both.

    Raises:
        RecipeError: there is none of a given name, or none that could judge.
    """
    there = {name.lower(): name for name in names}
    splits = {split: there[name] for split, usual in SPLIT_NAMES.items() for name in usual[::-1] if name in there}
    for split, name in given.items():
        if name not in there.values():
            raise RecipeError(f"real_data.splits.{split} is {name!r}, but {where} has {', '.join(sorted(names))}")
    splits |= given
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits["validation"]
    if "test" not in splits:
        raise RecipeError(
            f"{where} has {', '.join(sorted(names))} and no split that judges; give real_data.splits={{test: NAME}}"
        )
    return splits


@REAL_DATA.register("image_folder")
def image_folder(
    space: ImageSpace,
    *,
    root: str,
    classes: ClassMap = (),
    crop: Crop = 1.0,
    splits: dict[Split, str | Share] = {},  # noqa: B006 - nobody changes it, and `raydfkd show` prints it
    labels: str = "",
) -> RealData:
    """Pictures in class folders, `root/CLASS/*.jpg`, or in those of splits, `root/{train,val,test}/CLASS/*.jpg`.

    A class folder is the teacher's class of that name (case, spaces, hyphens and underscores do not matter), or of that
    number; folders with neither are taken in sorted order where there are as many as classes. ImageNet's flat
    validation folder needs `labels`. A picture that cannot be decoded is named and left out.

    Without folders of splits all pictures are the test split. `splits: {train: 0.8, validation: 0.1}` divides them,
    by the CRC-32 of their paths within `root`, so that a picture stays in its split when others come or go.

    Args:
        root: folder of the pictures.
        classes: the teacher's classes by name of a folder, such as {crow: 3}, or the names of folders in their order.
        crop: share of the edge that is kept of a picture once it is scaled, such as 0.875 for 256 pixels cut to 224.
        splits: folder of each split where it is not called as usual, or shares of a folder that has none.
        labels: file of a line "name label" for each picture in a flat folder, or of a label a line, in the order of
            the names; a label is a class of the teacher by name or number.
    """
    check_channels(space)
    folder = Path(root)
    if not folder.is_dir():
        raise RecipeError(f"real_data.root is {root!r}: there is no such folder; give that of the class folders")
    shares = {split: share for split, share in splits.items() if isinstance(share, float)}
    named = {split: name for split, name in splits.items() if isinstance(name, str)}
    places = _places(folder, named, shares)
    contents = {path: _content(path, labels) for path in dict.fromkeys(places.values())}
    if labels and not any(content.is_labelled for content in contents.values()):
        raise RecipeError(f"real_data.labels is {labels!r}, but the pictures are in class folders; give one of both")
    names = sorted({name for content in contents.values() for name in content.classes})
    numbers = {name: number for number, name in enumerate(names)}

    def load(split: Split) -> PictureStream:
        content, part = contents[places[split]], _part(split, shares)

        def pictures() -> Iterator[Picture]:
            for path, name in content.entries():
                short = path.relative_to(folder).as_posix()
                if part is None or crc32(short.encode()) / 2**32 in part:
                    yield Picture(short, partial(_read, path, numbers[name], space, crop))

        return PictureStream(pictures)

    return RealData(
        class_names=tuple(names),
        channels=space.channels,
        load=load,
        splits=tuple(split for split in SPLITS if split in places),
        matching=Matching(what="label" if labels else "class folder", given=classes),
        notes=_notes(folder, places, shares),
    )


def _read(path: Path, label: int, space: ImageSpace, crop: float) -> tuple[Tensor, int]:
    return read_picture(path, space, crop=crop), label


def _places(folder: Path, named: Mapping[Split, str], shares: Mapping[Split, float]) -> dict[Split, Path]:
    """The folder of each split that there is."""
    usual = {name for names in SPLIT_NAMES.values() for name in names} | set(named.values())
    inside = [path.name for path in _folders_in(folder)]
    if named or (inside and all(name.lower() in usual for name in inside)):
        if shares:
            raise RecipeError(
                f"real_data.splits has shares, but real_data.root {str(folder)!r} has the splits {', '.join(inside)}; "
                "give their names"
            )
        found = usual_splits(inside, named, where=f"real_data.root {str(folder)!r}")
        return {split: folder / name for split, name in found.items()}
    if "test" not in shares and sum(shares.values()) >= 1 or sum(shares.values()) > 1:
        raise RecipeError(f"real_data.splits has shares of {sum(shares.values()):g} in all; leave some for test")
    return dict.fromkeys([*shares, "test"], folder)


def _notes(folder: Path, places: Mapping[Split, Path], shares: Mapping[Split, float]) -> tuple[str, ...]:
    if shares or places["test"] != places.get("validation"):
        return ()
    return (f"real_data.root has no test folder; {places['test'].relative_to(folder)} judges",)


class _Part:
    """A share of the numbers from 0 to 1."""

    def __init__(self, start: float, end: float) -> None:
        self._start, self._end = start, end

    def __contains__(self, place: float) -> bool:
        return self._start <= place < self._end


def _part(split: Split, shares: Mapping[Split, float]) -> _Part | None:
    """Where a split lies between 0 and 1, train first, then validation; None where it is everything."""
    if not shares:
        return None
    start = sum(shares.get(before, 0.0) for before in SPLITS[: SPLITS.index(split)])
    return _Part(start, 1.0 if split == "test" else start + shares[split])


@dataclass(frozen=True, slots=True)
class _Content:
    """The pictures of a folder."""

    classes: Sequence[str]
    """Names of those that it has pictures of."""
    entries: Callable[[], Iterator[Entry]]
    is_labelled: bool = False
    """Whether a file says what they are of."""


def _content(folder: Path, labels: str) -> _Content:
    """What is in a folder, whose pictures are listed class by class when they are asked for.

    Raises:
        RecipeError: there is no class folder, or no picture in one of them; or the file of labels does not fit.
    """
    class_folders = _folders_in(folder)
    if labels and not class_folders:
        labelled = _labelled(folder, Path(labels))
        return _Content(
            sorted({label for _, label in labelled}),
            lambda: ((folder / name, label) for name, label in labelled),
            is_labelled=True,
        )
    if not class_folders:
        remedy = "give the file of their labels as real_data.labels" if any(map(is_picture, folder.iterdir())) else ""
        raise RecipeError(
            f"real_data.root: {str(folder)!r} has no class folders; "
            f"{remedy or 'put the pictures into a folder for each class'}"
        )
    for path in class_folders:
        if not any(map(is_picture, path.rglob("*"))):
            raise RecipeError(f"real_data.root: class folder {str(path)!r} has no pictures; add some, or remove it")
    return _Content(
        [path.name for path in class_folders],
        lambda: ((picture, path.name) for path in class_folders for picture in pictures_in(path)),
    )


def _folders_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _labelled(folder: Path, file: Path) -> list[tuple[str, str]]:
    """Names of the pictures right in a folder, each with the label that a file has of it."""
    text = read_text(file, f"real_data.labels is {str(file)!r}, which cannot be read")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    pictures = sorted(path.name for path in folder.iterdir() if is_picture(path))
    pairs = [re.split(r"[\s,]+", line, maxsplit=1) for line in lines]
    if all(len(pair) == 1 for pair in pairs):
        if len(pairs) != len(pictures):
            raise RecipeError(
                f"real_data.labels is {str(file)!r}, which has {len(pairs)} labels, but {str(folder)!r} has "
                f"{len(pictures)} pictures; give one for each"
            )
        pairs = [[name, label] for name, (label,) in zip(pictures, pairs, strict=True)]
    for number, pair in enumerate(pairs, 1):
        if len(pair) != 2:
            raise RecipeError(f"real_data.labels is {str(file)!r}, whose line {number} has no label; give one")
    known = {name: intern(label) for name, label in pairs}  # of a few texts for very many pictures
    missing = [name for name in pictures if name not in known]
    if missing or not pictures:
        first = f"{len(missing)} of them (first {missing[0]}) are not in {str(file)!r}" if missing else "there is none"
        raise RecipeError(f"real_data.root: of the pictures in {str(folder)!r} {first}; give a line for each")
    return [(name, known[name]) for name in pictures]
