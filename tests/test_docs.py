"""What docs/library.md and docs/transfer-set.md show is run as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_readme import TINY

import raydfkd
from raydfkd.config import load
from raydfkd.data.batches import SyntheticBatch
from raydfkd.data.encodings import Encoding
from raydfkd.data.transfer_set import TransferSet
from raydfkd.units import Request, WorkUnit

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


def test_examples_of_the_library_run_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    load_recipe = load.load_recipe
    monkeypatch.setattr(load, "load_recipe", lambda source, overrides: load_recipe(source, {**TINY, **overrides}))
    synthesis, training = blocks("library.md")
    assert all(len(block.splitlines()) <= 15 for block in (synthesis, training))
    names: dict[str, object] = {}
    exec(compile(synthesis, "library.md", "exec"), names)
    assert isinstance(names["images"], raydfkd.TransferSet)
    assert "torch.Size([20, 1, 8, 8]) [2, 2, 2, 2, 2, 2, 2, 2, 2, 2]" in capsys.readouterr().out
    del names["recipe"], names["images"]
    exec(compile(training, "library.md", "exec"), names)
    assert torch.isfinite(names["loss"])


@pytest.fixture
def pixels(tmp_path, monkeypatch):
    """The images of a set in ``runs/mine`` of the current folder; their objective is their number."""
    monkeypatch.chdir(tmp_path)
    found = TransferSet("runs/mine/transfer_set", digest="d", part_rows=6)
    found.create()
    images = torch.randint(0, 256, (12, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    request = Request(classes=(0, 1, 2, 3), images_per_class=3, seed=1, class_seeds=(0, 1, 2, 3))
    sink = found.open(WorkUnit(id="r000", request=request))
    for number, image in enumerate(images):
        label, logits = torch.tensor([number % 4]), torch.randn(1, 4).half()
        sink.write(SyntheticBatch(images=image[None], labels=label, teacher_logits=logits, objective=float(number)))
    sink.commit(seconds=0.0)
    return images


@pytest.mark.parametrize(
    ("library", "rows"),
    [("pandas", range(12)), ("polars", range(3, 12, 4)), ("duckdb", range(8)), ("datasets", range(12))],
)
def test_set_opens_as_pictures_as_printed(library, rows, pixels, tmp_path, monkeypatch):
    pytest.importorskip(library)
    if library == "datasets":
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    preamble, *examples = blocks("transfer-set.md")
    (example,) = [block for block in examples if f"import {library}\n" in block]
    assert len(example.splitlines()) == 4, "an import, a line between, and two lines"
    names: dict[str, object] = {}
    for block in (preamble, example):
        exec(compile(block, "transfer-set.md", "exec"), names)
    pictures = [row["image"] if library == "datasets" else row for row in names["pictures"]]
    assert all(isinstance(picture, Image.Image) for picture in pictures)
    found = torch.from_numpy(np.stack([np.array(picture) for picture in pictures])).permute(0, 3, 1, 2)
    assert torch.equal(found, pixels[list(rows)])


def test_all_logits_are_those_that_our_readers_return_as_printed(tmp_path):
    found = TransferSet(str(tmp_path), digest="d", encoding=Encoding(top_k=10))
    found.create()
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).half()
    request = Request(classes=(0,), images_per_class=3, seed=1, class_seeds=(0,))
    sink = found.open(WorkUnit(id="r000", request=request))
    images = torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    sink.write(SyntheticBatch(images=images, labels=torch.zeros(3).long(), teacher_logits=logits, objective=0.0))
    (part,) = sink.commit(seconds=0.0).parts
    preamble, rebuilt, *_ = blocks("transfer-set.md")
    names: dict[str, object] = {}
    exec(compile(preamble + rebuilt, "transfer-set.md", "exec"), names)
    rows = pq.read_table(tmp_path / part.path).to_pylist()
    read = [names["all_logits"](row["teacher_logits"], row["top_classes"]) for row in rows]
    assert np.array_equal(np.stack(read), found.read(part).teacher_logits.numpy())
