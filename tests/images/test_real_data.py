from __future__ import annotations

import gzip
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sklearn.datasets import load_digits

from raydfkd.config.schema import ImageSpace, PluginSpec
from raydfkd.errors import RecipeError
from raydfkd.images.real_data import REAL_DATA, open_real_data, some_of

SIZES = {"train": 1077, "validation": 180, "test": 540}
INSTALLED = Path("/usr/share/datasets/fashion-mnist")


def space(size=8, channels=1):
    return ImageSpace(channels=channels, size=size, mean=(0.5,) * channels, std=(0.5,) * channels)


def digits(size=8):
    return open_real_data(PluginSpec(kind="digits"), space(size), 10)


def refusal(spec, image_space=None, classes=10):
    with pytest.raises(RecipeError) as error:
        open_real_data(spec, image_space or space(), classes)
    assert "\n" not in str(error.value)
    return str(error.value)


def idx(values):
    """A file of bytes as Yann LeCun's page describes it."""
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.astype(np.uint8).tobytes()


def write_idx(folder, *, train=5, test=4, side=28, packed=()):
    """The four files; the pixels of image i are i % 251, its label i % 10."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, count in (("train", train), ("t10k", test)):
        images = np.broadcast_to(np.arange(count)[:, None, None] % 251, (count, side, side))
        for name, values in (("images-idx3", images), ("labels-idx1", np.arange(count) % 10)):
            content = idx(values)
            if stem in packed:
                (folder / f"{stem}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
            else:
                (folder / f"{stem}-{name}-ubyte").write_bytes(content)


def fashion(root, size=28):
    return open_real_data(PluginSpec(kind="fashion_mnist", root=str(root)), space(size), 10)


# Digits


def test_some_images_in_memory_are_evenly_spaced():
    split = digits().load("test")
    found, whole = some_of(split, 60), some_of(split, 10_000)
    assert torch.equal(found.labels, split.labels[torch.linspace(0, 539, 60).round().long()])
    assert len(found.images) == 60
    assert torch.equal(whole.images, split.images)


@pytest.mark.parametrize("size", [(16, 8), (8, 16), (10, 10), (12, 10)])
def test_digits_fill_images_that_are_not_square(size):
    images = digits(size).load("validation").images
    assert images.shape == (180, 1, *size)
    ink = digits().load("validation").images.float().mean().item()
    assert images.float().mean().item() == pytest.approx(ink, rel=0.4)


@pytest.mark.parametrize("split", SIZES)
def test_split_of_the_digits_has_its_size_and_eight_by_eight_bytes(split):
    data = digits().load(split)
    assert data.images.shape == (SIZES[split], 1, 8, 8)
    assert data.images.dtype == torch.uint8
    assert data.labels.shape == (SIZES[split],)
    assert data.labels.dtype == torch.int64


def test_splits_of_the_digits_together_are_every_digit_once():
    raw = load_digits()
    pixels = np.round(raw.images * 255 / 16).astype(np.uint8)
    all_digits = Counter((image.tobytes(), int(label)) for image, label in zip(pixels, raw.target, strict=True))
    found = Counter()
    for split in SIZES:
        data = digits().load(split)
        found.update(
            (image.numpy().tobytes(), int(label)) for image, label in zip(data.images, data.labels, strict=True)
        )
    assert found == all_digits
    assert found.total() == sum(SIZES.values()) == 1797


@pytest.mark.parametrize("split", SIZES)
def test_splits_of_the_digits_have_every_class_in_proportion(split):
    share = SIZES[split] / 1797
    expected = np.bincount(load_digits().target) * share
    assert np.abs(digits().load(split).labels.bincount(minlength=10).numpy() - expected).max() <= 1.5


def test_split_of_the_digits_is_always_the_same():
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global state that must not matter
    first = digits().load("validation")
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    assert torch.equal(digits().load("validation").images, first.images)


def test_digits_are_enlarged_bilinearly_to_the_image_size():
    small, large = digits(8).load("validation").images, digits(32).load("validation").images
    assert large.shape == (180, 1, 32, 32)
    places = ((np.arange(32) + 0.5) / 4 - 0.5).clip(0, 7)
    weights = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(8)))
    expected = weights @ small[:, 0].numpy().astype(float) @ weights.T
    assert np.abs(large[:, 0].numpy() - expected).max() <= 1.0


# Fashion-MNIST


@pytest.mark.parametrize("packed", [(), ("train", "t10k"), ("t10k",)], ids=str)
def test_fashion_mnist_is_read_from_idx_files_packed_or_not(tmp_path, packed):
    write_idx(tmp_path, packed=packed)
    data = fashion(tmp_path).load("test")
    assert torch.equal(data.images, torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 1, 28, 28))
    assert data.labels.tolist() == [0, 1, 2, 3]


def test_fashion_mnist_is_found_below_its_root(tmp_path):
    write_idx(tmp_path / "FashionMNIST/raw")
    assert len(fashion(tmp_path).load("train").labels) == 5


def test_last_five_thousand_training_garments_are_the_validation_split(tmp_path):
    write_idx(tmp_path, train=60_000, side=1)
    data = fashion(tmp_path, size=1)
    numbers = {split: data.load(split) for split in ("train", "validation")}
    assert [len(split.labels) for split in numbers.values()] == [55_000, 5_000]
    assert torch.equal(numbers["train"].images.flatten(), (torch.arange(55_000) % 251).to(torch.uint8))
    assert torch.equal(numbers["validation"].labels, torch.arange(55_000, 60_000) % 10)


def test_garments_are_padded_where_the_image_is_a_little_larger(tmp_path):
    write_idx(tmp_path)
    images = fashion(tmp_path, size=32).load("test").images
    assert images.shape == (4, 1, 32, 32)
    assert (images[3, 0, 2:30, 2:30] == 3).all()
    assert images[3].sum() == 3 * 28 * 28


def test_garments_are_scaled_where_the_image_is_much_larger_or_smaller(tmp_path):
    write_idx(tmp_path)
    for size in (14, 64):
        assert (fashion(tmp_path, size=size).load("test").images[3] == 3).all()


@pytest.mark.parametrize("missing", ["train-images", "train-labels", "t10k-images", "t10k-labels"])
def test_missing_file_is_named_with_the_package_that_has_it(tmp_path, missing):
    write_idx(tmp_path)
    next(tmp_path.glob(f"{missing}*")).unlink()
    assert refusal(PluginSpec(kind="fashion_mnist", root=str(tmp_path))) == (
        f"real_data.root is '{tmp_path}': no {missing} idx file there; apt-get install dataset-fashion-mnist, "
        "or set real_data.download=true"
    )


def test_folder_that_is_not_there_is_refused(tmp_path):
    assert "apt-get install dataset-fashion-mnist" in refusal(PluginSpec(kind="fashion_mnist", root=f"{tmp_path}/no"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t10k-images-idx3-ubyte", b"<html>not found</html>"),
        ("t10k-images-idx3-ubyte", b""),
        ("t10k-images-idx3-ubyte", b"\0\0\x08"),
        ("t10k-images-idx3-ubyte", idx(np.zeros((4, 28, 28)))[:-1]),
        ("t10k-images-idx3-ubyte.gz", b"not gzip"),
        ("t10k-images-idx3-ubyte.gz", gzip.compress(idx(np.zeros((4, 28, 28))))[:-9]),
    ],
    ids=["html", "empty", "header only", "torn", "not packed", "packed and torn"],
)
def test_damaged_file_is_named(tmp_path, name, content):
    write_idx(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError) as error:
        fashion(tmp_path).load("test")
    message = str(error.value)
    assert message.startswith(f"real_data.root: {tmp_path / name} is not an idx file of bytes (")
    assert message.endswith("; fetch it again")


@pytest.mark.skipif(not INSTALLED.is_dir(), reason="needs the package dataset-fashion-mnist")
def test_installed_fashion_mnist_has_its_seventy_thousand_garments():
    data = fashion(INSTALLED, size=28)
    assert data.class_names[9] == "Ankle boot"
    test = data.load("test")
    assert test.images.shape == (10_000, 1, 28, 28)
    assert test.labels.bincount().tolist() == [1000] * 10
    assert 72 < test.images.float().mean() < 74


# What does not fit


def test_unknown_data_set_is_named_with_the_closest_one():
    assert refusal(PluginSpec(kind="digitz")) == "real_data: unknown real data set 'digitz'; did you mean digits?"


def test_option_that_a_data_set_does_not_have_is_refused():
    assert refusal(PluginSpec(kind="digits", root="x")) == "real_data.root: unknown key; there are none"
    assert refusal(PluginSpec(kind="fashion_mnist", rot="x")) == "real_data.rot: unknown key; did you mean root?"


def test_other_class_count_than_the_teachers_is_refused():
    assert refusal(PluginSpec(kind="digits"), classes=9) == "teacher.classes is 9, but digits has 10 classes"


def test_other_channels_than_the_teachers_are_refused():
    assert refusal(PluginSpec(kind="digits"), space(channels=3)) == (
        "teacher.image_space.channels is 3, but digits has 1; use that"
    )


@pytest.mark.parametrize("kind", ["digits", "fashion_mnist"])
def test_data_set_is_grey_and_names_ten_classes(kind, tmp_path):
    write_idx(tmp_path)
    options = {"root": str(tmp_path)} if kind == "fashion_mnist" else {}
    data = REAL_DATA.build(kind, options, space(28), where="real_data")
    assert (data.channels, len(set(data.class_names))) == (1, 10)


def test_every_kind_has_an_example_on_the_page_that_its_options_allow():
    section = (Path(__file__).parents[2] / "docs/recipes.md").read_text().partition("## Data to judge by")[2]
    lines = section.partition("```yaml")[2].partition("```")[0].strip().splitlines()
    specs = [PluginSpec.model_validate(yaml.safe_load(line)["real_data"]) for line in lines]
    for spec in specs:
        if spec.kind != "mymodule:my_data":
            REAL_DATA.check(spec.kind, spec.options, where="real_data")
    kinds = {"torchvision:CIFAR10", "mymodule:my_data", "fashion_mnist", *(spec.kind for spec in specs)}
    assert kinds == {"torchvision:CIFAR10", "mymodule:my_data", *REAL_DATA.names()}
