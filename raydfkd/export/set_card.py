"""The dataset card of an exported transfer set, by which ``datasets`` finds its files."""

from __future__ import annotations

from typing import Any

import yaml

from raydfkd import __version__
from raydfkd.export.pictures import PictureSet

LICENSE = "# license: fill in; it may depend on that of the teacher"
CARD_TAG = "raydfkd-transfer-set"
"""By this tag an export knows the card, and so the files, of an earlier one."""
_READING = {
    "parquet": """```python
import datasets

images = datasets.load_dataset("FOLDER", split="train")  # image (PIL), label, teacher_logits, unit, seed, index
```""",
    "webdataset": """```python
import glob, webdataset

shards = sorted(glob.glob("FOLDER/data/*.tar"))
images = webdataset.WebDataset(shards, shardshuffle=False).decode("pil")  # png, cls, json
```""",
    "folder": """```python
import torchvision

images = torchvision.datasets.ImageFolder("FOLDER")  # its classes are sorted by name
```""",
}


def dataset_card(pictures: PictureSet, name: str, form: str, size: int) -> str:
    """The README.md of a set that was exported as ``form`` in ``size`` bytes."""
    snapshot = pictures.snapshot
    channels, height, width = pictures.shape
    named = ", ".join(pictures.class_names[:10]) + (", ..." if len(pictures.class_names) > 10 else "")
    facts = {
        "images": f"{snapshot.images:,} of {channels} channels, {height} x {width} pixels, PNG",
        "classes": f"{len(pictures.class_names):,}: {named}",
        "teacher": f"`{_teacher(pictures)}`",
        "teacher_logits": _logits(pictures),
        "units of work": f"{len(snapshot.commits):,}",
        "content digest": f"`{snapshot.content_digest()}`",
    }
    parts = [
        f"# {name}: synthetic images",
        f"Images that raydfkd {__version__} made by inverting a trained network, the teacher, and its logits. "
        "They are made of what the network knows, and may resemble what it was trained on: whether they can be "
        "published is for the owner of its data to say.",
        "\n".join(["| | |", "|---|---|", *(f"| {key} | {fact} |" for key, fact in facts.items())]),
        "## How to read it",
        _READING[form],
        "`label` is the class that an image was made for, or the teacher's answer where none was asked for. `unit`, "
        "`seed` and `index` say where it comes from: the unit of work, its seed, and the image's number in it.",
        "## License",
        "Not filled in. Whoever publishes this says under which license, here and in the head of this file.",
    ]
    head = yaml.safe_dump(_head(pictures, form, size), sort_keys=False, allow_unicode=True)
    return f"---\n{head}{LICENSE}\n---\n\n" + "\n\n".join(parts) + "\n"


def _logits(pictures: PictureSet) -> str:
    if pictures.top_k is None:
        return "of all classes"
    return (
        f"the {pictures.top_k} largest as the teacher gave them; the others are equal, and share the rest of the "
        "probability"
    )


def _head(pictures: PictureSet, form: str, size: int) -> dict[str, Any]:
    head: dict[str, Any] = {
        "task_categories": ["image-classification"],
        "tags": ["synthetic", "knowledge-distillation", "data-free", CARD_TAG],
    }
    if form == "folder":
        return head
    ending = {"parquet": "parquet", "webdataset": "tar"}[form]
    files = [{"split": "train", "path": f"data/train-*.{ending}"}]
    head["configs"] = [{"config_name": "default", "data_files": files}]
    if form == "parquet":
        head["dataset_info"] = _info(pictures, size)
    return head


def _info(pictures: PictureSet, size: int) -> dict[str, Any]:
    names = {str(label): name for label, name in enumerate(pictures.class_names)}
    features = [
        {"name": "image", "dtype": "image"},
        {"name": "label", "dtype": {"class_label": {"names": names}}},
        {"name": "teacher_logits", "sequence": "float32", "length": len(names)},
        {"name": "unit", "dtype": "string"},
        {"name": "seed", "dtype": "int64"},
        {"name": "index", "dtype": "int32"},
    ]
    splits = [{"name": "train", "num_bytes": size, "num_examples": pictures.snapshot.images}]
    return {"features": features, "splits": splits, "download_size": size, "dataset_size": size}


def _teacher(pictures: PictureSet) -> str:
    made_of = pictures.transfer_set.made_of.get("teacher")
    return str(made_of.get("network", "unknown")) if isinstance(made_of, dict) else "unknown"
