"""Pictures and labels in columns of Parquet files, local or on an object store."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from raydfkd.config.schema import ImageSpace, Text
from raydfkd.errors import RecipeError, did_you_mean, one_line
from raydfkd.images.classes import ClassMap, Matching
from raydfkd.images.folders import Crop
from raydfkd.images.pictures import BrokenPictureError, check_channels, read_picture
from raydfkd.images.real_data import REAL_DATA, SPLITS, RealData, Split
from raydfkd.images.streams import Picture, PictureStream

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

Files = Text | tuple[Text, ...]
ROWS = 64
"""Rows that are handed on at once; more of a file are in memory only as far as its row groups are large."""
_EXTRAS = {"s3fs": "s3", "gcsfs": "gcs"}


@REAL_DATA.register("parquet")
def parquet(
    space: ImageSpace,
    *,
    files: Files | dict[Split, Files],
    image: Text = "image",
    label: Text = "label",
    classes: ClassMap = (),
    crop: Crop = 1.0,
) -> RealData:
    """Columns of pictures and of labels in Parquet files, read row group by row group.

    A picture is a file's bytes, a struct with `bytes` as Hugging Face writes it, or raw pixels with their shape in the
    column's metadata, as a transfer set of raydfkd has them. A label is a text, a number, or a number with names in
    Hugging Face's metadata; it is the teacher's class of that name or number.

    Args:
        files: path, glob, folder or URI, or a list of those; by split where there are several, else they are test.
        image: column of the pictures.
        label: column of the labels.
        classes: the teacher's classes by name of a label, or names of labels in the teacher's order.
        crop: share of the edge that is kept of a picture once it is scaled.
    """
    by_split: Mapping[Split, Files] = files if isinstance(files, dict) else {"test": files}
    if "test" not in by_split:
        raise RecipeError(f"real_data.files has {', '.join(by_split)} and no test, which judges; give it as well")
    found = {split: _Table.find(given, image, label) for split, given in by_split.items()}
    tables = list(found.values())
    if not all(table.shape == space.shape for table in tables):
        check_channels(space)
    declared = next((table.declared for table in tables if table.declared), None)
    names = declared or tuple(sorted({str(value) for table in tables for value in table.labels()}))
    numbers = {name: number for number, name in enumerate(names)}

    def load(split: Split) -> PictureStream:
        table = found[split]

        def pictures() -> Iterator[Picture]:
            for name, content, value in table.rows():
                number = value if value is None or declared else numbers[str(value)]
                yield Picture(name, partial(_read, content, table.shape, number, space, crop))

        return PictureStream(pictures)

    return RealData(
        class_names=names,
        channels=space.channels,
        load=load,
        splits=tuple(split for split in SPLITS if split in found),
        matching=Matching(what="label", given=classes, is_sorted=declared is None),
    )


def _read(
    content: bytes | None, shape: tuple[int, ...] | None, label: int | None, space: ImageSpace, crop: float
) -> tuple[Tensor, int]:
    if content is None or label is None:
        raise BrokenPictureError("there is none")
    if shape is None:
        return read_picture(content, space, crop=crop), label
    pixels = np.frombuffer(content, np.uint8).reshape(shape)
    if shape == space.shape:
        return torch.from_numpy(pixels.copy()), label
    picture = Image.fromarray(pixels[0] if shape[0] == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return read_picture(picture, space, crop=crop), label


class _Table:
    """Files with the same columns, one after another."""

    def __init__(self, fs: Any, paths: Sequence[str], image: str, label: str) -> None:
        self._fs, self._paths = fs, paths
        self._columns = [image, label]
        with self._opened(paths[0]) as file:
            schema: pa.Schema = file.schema_arrow
        for key, column in (("image", image), ("label", label)):
            if column not in schema.names:
                raise RecipeError(
                    f"real_data.{key} is {column!r}, but {paths[0]} has no such column; "
                    f"{did_you_mean(column, schema.names)}"
                )
        self.shape = _shape_of(schema.field(image))
        """Of a raw image (C, H, W); None where the column holds picture files."""
        self.declared = _names_in(schema, label)
        """Names of the numbers, where the file has them."""

    @classmethod
    def find(cls, given: Files, image: str, label: str) -> _Table:
        """The files that a recipe gives.

        Raises:
            RecipeError: there are none, they cannot be opened, or a column is missing.
        """
        import fsspec

        paths: list[str] = []
        for uri in [given] if isinstance(given, str) else given:
            try:
                fs, path = fsspec.url_to_fs(uri)
                inside = fs.glob(f"{path}/**/*.parquet") if fs.isdir(path) else []
                here = sorted(inside or (path for path in fs.glob(path) if not fs.isdir(path)))
            except ImportError as error:
                extra = _EXTRAS.get(getattr(error.__cause__, "name", None) or "", "")
                remedy = f"pip install 'raydfkd[{extra}]'" if extra else one_line(error)
                raise RecipeError(f"real_data.files is {uri!r}, which needs a file system; {remedy}") from None
            except Exception as error:  # each file system raises its own
                raise RecipeError(f"real_data.files is {uri!r}, which cannot be listed: {one_line(error)}") from None
            if not here:
                raise RecipeError(f"real_data.files is {uri!r}: there is no such file; give a path, a glob or a folder")
            paths += here
        return cls(fs, paths, image, label)

    def labels(self) -> set[Any]:
        """Every label that there is; reads that column alone."""
        found: set[Any] = set()
        for path in self._paths:
            with self._opened(path) as file:
                for batch in file.iter_batches(columns=self._columns[1:]):
                    found.update(batch.column(0).unique().to_pylist())
        return found - {None}

    def rows(self) -> Iterator[tuple[str, bytes | None, Any]]:
        """Name, content and label of each picture, in the order of the files."""
        for path in self._paths:
            row = 0
            with self._opened(path) as file:
                for batch in file.iter_batches(batch_size=ROWS, columns=self._columns):
                    images, labels = (batch.column(column).to_pylist() for column in self._columns)
                    for picture, label in zip(images, labels, strict=True):
                        content = picture.get("bytes") if isinstance(picture, dict) else picture
                        yield f"row {row} of {path}", content, label
                        row += 1

    @contextmanager
    def _opened(self, path: str) -> Iterator[pq.ParquetFile]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with self._fs.open(path) as stream:
                yield pq.ParquetFile(stream)
        except (pa.ArrowException, OSError) as error:
            raise RecipeError(f"real_data.files: {path} is no Parquet file ({one_line(error)})") from None


def _shape_of(field: pa.Field) -> tuple[int, ...] | None:
    metadata = field.metadata or {}
    if b"shape" not in metadata or metadata.get(b"encoding", b"raw") != b"raw":
        return None
    return tuple(int(size) for size in metadata[b"shape"].decode().split(","))


def _names_in(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    """Names of the labels in the metadata that Hugging Face's `datasets` writes."""
    import pyarrow as pa

    if not pa.types.is_integer(schema.field(label).type):
        return None
    try:
        features: Mapping[str, Any] = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names: Iterable[str] = features[label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(names)
