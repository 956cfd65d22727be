"""Data sets that Hugging Face's `datasets` opens: of its hub, or in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from raydfkd.config.schema import ImageSpace, Text
from raydfkd.errors import RecipeError, did_you_mean, one_line
from raydfkd.images.classes import ClassMap, Matching
from raydfkd.images.folders import Crop, usual_splits
from raydfkd.images.pictures import BrokenPictureError, check_channels, read_picture
from raydfkd.images.real_data import REAL_DATA, SPLITS, RealData, Split
from raydfkd.images.streams import Picture, PictureStream


@REAL_DATA.register("huggingface")
def huggingface(
    space: ImageSpace,
    *,
    name: Text,
    config: str = "",
    splits: dict[Split, str] = {},  # noqa: B006 - nobody changes it, and `raydfkd show` prints it
    image: Text = "image",
    label: Text = "label",
    classes: ClassMap = (),
    crop: Crop = 1.0,
) -> RealData:
    """A data set of Hugging Face's hub, or in a folder: what `datasets.load_dataset` or `load_from_disk` opens.

    A label is a text, a number, or a number with names (`ClassLabel`): the teacher's class of that name or number.
    Files of the hub are fetched into the cache of `datasets` before any work; its code is never run.

    Args:
        name: name on the hub, such as ylecun/mnist, or a folder, which works offline.
        config: configuration, where the set has several.
        splits: name of each split where it is not called as usual, such as {test: validation}.
        image: column of the pictures.
        label: column of the labels.
        classes: the teacher's classes by name of one of the set's, or these names in the teacher's order.
        crop: share of the edge that is kept of a picture once it is scaled.
    """
    check_channels(space)
    tables = _load(name, config)
    chosen = usual_splits(tables, splits, where=f"real_data.name {name!r}")
    for key, column in (("image", image), ("label", label)):
        columns = tables[chosen["test"]].column_names
        if column not in columns:
            raise RecipeError(
                f"real_data.{key} is {column!r}, but {name} has no such column; {did_you_mean(column, columns)}"
            )
    declared: list[str] | None = getattr(tables[chosen["test"]].features[label], "names", None)
    found = {str(value) for split in chosen.values() for value in tables[split].unique(label) if value is not None}
    names = tuple(declared or sorted(found))
    numbers = {text: number for number, text in enumerate(names)}

    def load(split: Split) -> PictureStream:
        table = _undecoded(tables[chosen[split]].select_columns([image, label]), image)

        def pictures() -> Iterator[Picture]:
            for number, row in enumerate(table):
                value = row[label]
                told = value if value is None or declared else numbers[str(value)]
                yield Picture(f"row {number} of {chosen[split]}", partial(_read, row[image], told, space, crop))

        return PictureStream(pictures)

    return RealData(
        class_names=names,
        channels=space.channels,
        load=load,
        splits=tuple(split for split in SPLITS if split in chosen),
        matching=Matching(what="label", given=classes, is_sorted=declared is None),
    )


def _load(name: str, config: str) -> Mapping[str, Any]:
    """The splits of a set, memory-mapped, by their names."""
    try:
        import datasets
    except ImportError:
        raise RecipeError("real_data.kind is huggingface, which needs datasets; pip install 'raydfkd[hf]'") from None
    try:
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            saved = datasets.load_from_disk(name)
            return dict(saved) if isinstance(saved, datasets.DatasetDict) else {"test": saved}
        return dict(datasets.load_dataset(name, config or None))
    except Exception as error:  # hub out of reach, no such set, private, several configurations, foreign files
        raise RecipeError(
            f"real_data.name is {name!r}, which datasets cannot open ({one_line(error)[:200]}); give a name on the hub "
            "that can be reached, or a folder"
        ) from error


def _undecoded(table: Any, image: str) -> Any:
    import datasets

    feature = table.features[image]
    return table.cast_column(image, datasets.Image(decode=False)) if isinstance(feature, datasets.Image) else table


def _read(content: Any, label: int | None, space: ImageSpace, crop: float) -> tuple[Tensor, int]:
    if isinstance(content, dict):
        content = content["bytes"] or (Path(content["path"]) if content["path"] else None)
    if content is None or label is None:
        raise BrokenPictureError("there is none")
    return read_picture(content, space, crop=crop), label
