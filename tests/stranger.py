"""Somebody's checkpoint and pictures: what `raydfkd init` is given by people who bring their own.

    python tests/stranger.py FOLDER [--plain]

writes mynet.py, model.pt and pictures/ there; with ``--plain`` a network without BatchNorm.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

MODULE = """from torch import nn


def build(width=32):
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU()),
        *(nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False), nn.BatchNorm2d(4 * width), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)),
    )
"""
PLAIN = """from torch import nn


def build(width=16):
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(width, 2 * width, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(72 * width, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
"""
MEAN, STD = 0.5, 0.5
"""What the network was trained with, images from -1 to 1; nobody tells."""


def write(folder: Path, *, epochs: int = 20, module: str = MODULE) -> float:
    """Write mynet.py, a trained model.pt and pictures/CLASS/*.png, 540 digits that the training has not seen.

    Returns the network's accuracy on them.
    """
    data = load_digits()
    digits = F.interpolate(torch.from_numpy(data.images).float()[:, None] / 16, size=(32, 32), mode="bilinear")
    labels = torch.from_numpy(data.target).long()
    train, test = train_test_split(range(len(labels)), test_size=540, stratify=data.target, random_state=0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mynet.py").write_text(module)
    scope: dict[str, object] = {}
    exec(compile(module, "mynet.py", "exec"), scope)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: nn.Module = scope["build"]()  # type: ignore[operator]
        _train(network, _normalized(digits[train]), labels[train], epochs)
    torch.save({"model": network.state_dict(), "epoch": epochs}, folder / "model.pt")
    for position in test:
        place = folder / "pictures" / str(int(labels[position]))
        place.mkdir(parents=True, exist_ok=True)
        pixels = (digits[position, 0] * 255).round().byte().numpy()
        Image.fromarray(pixels).save(place / f"{position}.png")
    with torch.no_grad():
        return float((network(_normalized(digits[test])).argmax(1) == labels[test]).float().mean())


def _normalized(images: Tensor) -> Tensor:
    return (images - MEAN) / STD


def _train(network: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    network.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
    network.eval()


if __name__ == "__main__":
    torch.set_num_threads(1)
    accuracy = write(Path(sys.argv[1]), module=PLAIN if "--plain" in sys.argv else MODULE)
    sys.stdout.write(f"{accuracy:.1%} of the pictures\n")
