"""A transfer set in the layouts that others read: Hugging Face's Parquet of images, WebDataset, folders of classes."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydfkd.errors import RecipeError
from raydfkd.export.pictures import Picture, PictureSet
from raydfkd.export.set_card import CARD_TAG, dataset_card
from raydfkd.store.store import Store

SHARD_BYTES = 64 * 2**20
"""Bytes of unpacked pixels in a shard, which is held whole until it is written; PNG takes about as many."""
GROUP_BYTES = 4 * 2**20
"""The same of a Parquet row group, which readers unpack at once."""
_SHARD = re.compile(r"data/train-\d{5}-of-\d{5}\.(parquet|tar)")


def export_set(pictures: PictureSet, name: str, to: str, form: str) -> dict[str, Any]:
    """Write a set as pictures, and a card, to a folder or URI; memory does not grow with the set.

    Each file is written whole or not at all. Shards of an earlier, longer export to the same place are removed.
    Returns the place, and the numbers of images and files.

    Args:
        pictures: the set.
        name: of the recipe, for the card.
        to: where to write.
        form: ``parquet``, ``webdataset`` or ``folder``.

    Raises:
        RecipeError: ``to`` cannot be written, or holds shards of another data set.
        RunError: a unit is damaged; it is taken out of the set.
    """
    store = Store(to)
    store.probe("--to", once=False)
    _refuse_shards_of_others(store)
    store.put("README.md", dataset_card(pictures, name, form, 0).encode())
    files, size = 0, 0
    written = set()
    for path, content in LAYOUTS[form](pictures):
        store.put(path, content)
        files, size = files + 1, size + len(content)
        if _SHARD.fullmatch(path):
            written.add(path)
    for path in store.list("data"):
        if _SHARD.fullmatch(path) and path not in written:
            store.delete(path)
    store.put("README.md", dataset_card(pictures, name, form, size).encode())
    return {"folder": store.uri, "images": pictures.snapshot.images, "files": files + 1}


def _refuse_shards_of_others(store: Store) -> None:
    """An export replaces the one before, and nothing else."""
    if not any(_SHARD.fullmatch(path) for path in store.list("data")):
        return
    card = store.get("README.md") if store.exists("README.md") else b""
    if CARD_TAG.encode() not in card:
        raise RecipeError(
            f"--to is {store.uri}: there are shards in data/ that no export has written; give another folder"
        )


def _parquet(pictures: PictureSet) -> Iterator[tuple[str, bytes]]:
    schema = _schema(pictures)
    for path, shard in _shards(pictures, "parquet"):
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=["label", "unit", "seed"]) as writer:
            for group in _batched(shard, _count(pictures, GROUP_BYTES)):
                writer.write_table(_table(group, schema))
        yield path, sink.getvalue().to_pybytes()


def _schema(pictures: PictureSet) -> pa.Schema:
    """The columns, with metadata by which ``datasets`` knows pictures and names of classes."""
    classes = len(pictures.class_names)
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(pictures.class_names), "_type": "ClassLabel"},
        "teacher_logits": {"feature": _value("float32"), "length": classes, "_type": "Sequence"},
        "unit": _value("string"),
        "seed": _value("int64"),
        "index": _value("int32"),
    }
    columns = {
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "label": pa.int64(),
        "teacher_logits": pa.list_(pa.float32(), classes),
        "unit": pa.string(),
        "seed": pa.int64(),
        "index": pa.int32(),
    }
    return pa.schema(columns, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _value(dtype: str) -> dict[str, str]:
    return {"dtype": dtype, "_type": "Value"}


def _table(group: Iterable[Picture], schema: pa.Schema) -> pa.Table:
    rows = [
        {
            "image": {"bytes": picture.png, "path": f"{picture.name}.png"},
            "label": picture.label,
            "teacher_logits": picture.teacher_logits,
            "unit": picture.unit,
            "seed": picture.seed,
            "index": picture.index,
        }
        for picture in group
    ]
    return pa.Table.from_pylist(rows, schema=schema)


def _webdataset(pictures: PictureSet) -> Iterator[tuple[str, bytes]]:
    for path, shard in _shards(pictures, "tar"):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as tar:
            for picture in shard:
                for ending, data in _members(picture):
                    member = tarfile.TarInfo(f"{picture.name}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        yield path, content.getvalue()


def _members(picture: Picture) -> Iterator[tuple[str, bytes]]:
    """The files of one sample: picture, number of its class, and all else that is known of it."""
    known = {
        "label": picture.label,
        "class_name": picture.class_name,
        "teacher_logits": picture.teacher_logits,
        "unit": picture.unit,
        "seed": picture.seed,
        "index": picture.index,
    }
    yield "png", picture.png
    yield "cls", str(picture.label).encode()
    yield "json", json.dumps(known).encode()


def _folders(pictures: PictureSet) -> Iterator[tuple[str, bytes]]:
    names = folder_names(pictures.class_names)
    for picture in pictures:
        yield f"{names[picture.label]}/{picture.name}.png", picture.png


def folder_names(class_names: Iterable[str]) -> list[str]:
    """Names of classes as those of folders, on any file system; those that would be the same begin with the number."""
    safe = [re.sub(r"[^\w,' -]", "_", name).strip() for name in class_names]
    counts = Counter(name.casefold() for name in safe)
    return [
        name if name and counts[name.casefold()] == 1 else f"{label}-{name}".strip("-")
        for label, name in enumerate(safe)
    ]


LAYOUTS: Mapping[str, Callable[[PictureSet], Iterator[tuple[str, bytes]]]] = {
    "parquet": _parquet,
    "webdataset": _webdataset,
    "folder": _folders,
}
"""Paths and contents of the files of a set, by format; one at a time."""


def _shards(pictures: PictureSet, ending: str) -> Iterator[tuple[str, Iterator[Picture]]]:
    """Paths of shards and the pictures in them; what a shard does not read is lost to the next."""
    rows = _count(pictures, SHARD_BYTES)
    shards = -(-pictures.snapshot.images // rows)
    remaining = iter(pictures)
    for number in range(shards):
        yield f"data/train-{number:05d}-of-{shards:05d}.{ending}", islice(remaining, rows)


def _count(pictures: PictureSet, size: int) -> int:
    """Pictures of ``size`` bytes together, one at least."""
    return max(1, size // int(np.prod(pictures.shape)))


def _batched(items: Iterator[Picture], count: int) -> Iterator[list[Picture]]:
    while batch := list(islice(items, count)):
        yield batch
