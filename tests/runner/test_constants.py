"""Size and normalisation of a stranger's teacher, by labelled pictures."""

from __future__ import annotations

import shutil
import sys

import pytest
import stranger
import torch
from PIL import Image

from raydfkd.cli import app
from raydfkd.config.load import load_recipe
from raydfkd.errors import RecipeError
from raydfkd.networks.scout import scout
from raydfkd.runner.constants import fit_to_pictures, tempered
from raydfkd.runner.run import run


@pytest.fixture(scope="module")
def brought(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stranger")
    accuracy = stranger.write(folder, epochs=4)
    assert accuracy > 0.8
    return folder, accuracy


@pytest.fixture
def there(brought, tmp_path, monkeypatch):
    """A copy of what the stranger brings, as the current folder; returns the teacher's accuracy."""
    folder, accuracy = brought
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield accuracy
    sys.modules.pop("mynet", None)


def seen(**given):
    return scout("mynet:build", options={}, weights="model.pt", given=given)


@pytest.mark.usefixtures("there")
def test_constants_are_those_with_which_the_teacher_knows_most():
    found = fit_to_pictures(seen(), "pictures")
    assert found.section["image_space"] == {"channels": 1, "size": 32, "mean": [0.5], "std": [0.5]}
    assert found.sources["size"] == "that of the pictures in --data"
    assert found.sources["mean"].startswith("from -1 to 1: the teacher knows ")
    assert found.sources["mean"].endswith("% of 200 pictures, most of 6 tried")
    assert found.notes == ()


@pytest.mark.usefixtures("there")
def test_what_was_given_is_not_tried():
    found = fit_to_pictures(seen(image_space={"mean": [0.1], "std": [0.9], "size": 28}), "pictures")
    assert found.section["image_space"] == {"channels": 1, "size": 28, "mean": [0.1], "std": [0.9]}
    assert found.sources["mean"] == found.sources["size"] == "given"


@pytest.mark.usefixtures("there")
def test_teacher_that_knows_little_more_than_chance_is_doubted(tmp_path):
    labels = [str(label) for label in range(10)]
    for label, other in zip(labels, labels[1:] + labels[:1], strict=True):
        (tmp_path / "pictures" / label).rename(tmp_path / f"was-{other}")
    for label in labels:
        (tmp_path / f"was-{label}").rename(tmp_path / "pictures" / label)
    (note,) = fit_to_pictures(seen(), "pictures").notes
    assert note.startswith("the teacher knows only ")
    assert note.endswith("check its weights, --size, --mean and --std, and which folder is which class")


@pytest.mark.usefixtures("there")
def test_teacher_that_is_sure_of_noise_gets_a_temperature_and_no_other_does():
    found = seen()
    assert tempered(found) is found
    checkpoint = torch.load("model.pt", weights_only=True)
    for tensor in checkpoint["model"].values():
        if tensor.ndim and len(tensor) == 10:
            tensor.mul_(1000)
    torch.save(checkpoint, "model.pt")
    found = tempered(seen())
    assert found.section["temperature"] > 10
    assert "sure of all that it sees" in found.sources["temperature"]


@pytest.mark.usefixtures("there")
def test_pictures_of_different_sizes_tell_none(tmp_path):
    Image.new("L", (40, 50)).save(tmp_path / "pictures/0/other.png")
    found = fit_to_pictures(seen(), "pictures")
    assert found.section["image_space"]["size"] == 32
    assert found.sources["size"].startswith("a guess")


@pytest.mark.usefixtures("there")
def test_class_folder_that_the_teacher_does_not_have_is_named(tmp_path):
    (tmp_path / "pictures/0").rename(tmp_path / "pictures/yacht")
    with pytest.raises(RecipeError, match="nobody knows which of the teacher's 10 classes each class folder is"):
        fit_to_pictures(seen(), "pictures")


@pytest.mark.cluster
def test_recipe_of_init_judges_on_the_pictures(there, monkeypatch):
    arguments = ["init", "--network", "mynet:build", "--weights", "model.pt", "--data", "pictures", "--budget", "20h"]
    monkeypatch.setattr(sys, "argv", ["raydfkd", *arguments])
    app(arguments, standalone_mode=False)
    recipe = load_recipe("build.yaml")
    assert recipe.real_data.kind == "image_folder"
    assert recipe.teacher.image_space.std == (0.5,)
    few = {"images_per_class": 4, "unit": {"classes": 10, "images_per_class": 2}}
    changes = {"transfer_set": few, "synthesis.steps": 2, "synthesis.renewal.steps": 1, "distill.steps": 4, "rounds": 2}
    report = run(
        load_recipe("build.yaml", {**changes, "distill.source.wait_for": 1, "runtime.executor": "local"})
    ).report
    assert report["judged_on"] == "real image_folder test images"
    assert report["judged_images"] == 540
    assert report["teacher"]["top1"] == pytest.approx(there, abs=0.01)
