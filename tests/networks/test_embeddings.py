"""Class embeddings from a file."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.torch
import torch
from toy import CLASSES, batches_of, joined, toy_recipe

from raydfkd.errors import RecipeError
from raydfkd.job import open_job
from raydfkd.networks.embeddings import embeddings_of
from raydfkd.runner.check import check

TOLD = ("synthesis.conditional=true", "synthesis.emissions=1", "transfer_set.unit.classes=4")


def recipe_with(folder, vectors, *, suffix="npy", settings=TOLD):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"classes.{suffix}"
    if suffix == "npy":
        np.save(path, vectors.numpy())
    elif suffix == "pt":
        torch.save({"vectors": vectors}, path)
    else:
        safetensors.torch.save_file({"vectors": vectors}, path)
    return toy_recipe(folder, [*settings, f"synthesis.embeddings={path}"], synthesizer="generator")


@pytest.mark.parametrize("suffix", ["npy", "pt", "safetensors"])
def test_embeddings_are_read_as_they_were_written(tmp_path, suffix):
    vectors = torch.randn(CLASSES, 6)
    assert torch.equal(embeddings_of(recipe_with(tmp_path, vectors, suffix=suffix)), vectors)


def test_embeddings_change_the_images_and_count_by_their_content(tmp_path):
    vectors = torch.randn(CLASSES, 6)
    one, same = (recipe_with(tmp_path / name, vectors) for name in "ab")
    other = recipe_with(tmp_path / "c", -vectors)
    digests = [open_job(recipe).digest for recipe in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]
    images = [joined(batches_of(recipe)).images for recipe in (one, same, other)]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_embeddings_are_called_outside_knowledge(tmp_path):
    prepared = check(recipe_with(tmp_path, torch.randn(CLASSES, 6)))
    assert "outside knowledge" in prepared.not_data_free


WRONG = {
    "another class count": (torch.randn(CLASSES + 1, 6), TOLD, "but the teacher has 4 classes; give a row each"),
    "a vector of nothing": (torch.zeros(CLASSES, 6), TOLD, "a vector is zero or not finite"),
    "nobody is told": (torch.randn(CLASSES, 6), (), "no generator is told its class"),
}


@pytest.mark.parametrize(("vectors", "settings", "message"), WRONG.values(), ids=list(WRONG))
def test_embeddings_that_do_not_fit_are_refused_before_any_work(tmp_path, vectors, settings, message):
    with pytest.raises(RecipeError, match=message):
        check(recipe_with(tmp_path, vectors, settings=settings))


def test_file_that_holds_no_embeddings_is_refused(tmp_path):
    (tmp_path / "classes.npy").write_bytes(b"nothing")
    recipe = toy_recipe(tmp_path, [*TOLD, f"synthesis.embeddings={tmp_path}/classes.npy"], synthesizer="generator")
    with pytest.raises(RecipeError, match="cannot be read"):
        embeddings_of(recipe)
