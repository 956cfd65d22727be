"""Networks of nobody's zoo, `raydfkd init` and `run` as they are, and what the estimate says beside real digits.

    python tests/report/strangers.py FOLDER [--budget 100s] [--only NAME ...]

Networks written without raydfkd in mind (strangers_networks.py), trained here on scikit-learn's digits at 16 or
32 pixels or on Fashion-MNIST at 28; other pictures judge, which neither init nor run is given. Prints a row each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from raydfkd.config.schema import ImageSpace
from raydfkd.images.packaged_data import fashion_mnist
from raydfkd.images.real_data import LabelledImages

NETWORKS = Path(__file__).parent / "strangers_networks.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stranger:
    """A network that somebody brings, and what it was trained on."""

    load: Callable[[int], Pictures]
    edge: int
    mean: float
    std: float
    epochs: int
    moved: bool = False
    """Whether its pictures are moved by up to two pixels in training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Labelled pictures from 0 to 1, those that train and those that judge."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits(edge: int) -> Pictures:
    """Scikit-learn's: 1,257 train, 540 judge."""
    data = load_digits()
    images = F.interpolate(torch.from_numpy(data.images).float()[:, None] / 16, size=(edge, edge), mode="bilinear")
    images, labels = images.clamp(0, 1), torch.from_numpy(data.target).long()
    train, test = train_test_split(range(len(images)), test_size=540, stratify=data.target, random_state=0)
    return Pictures(train=(images[train], labels[train]), test=(images[test], labels[test]))


def garments(edge: int) -> Pictures:
    """Fashion-MNIST: 12,000 of its training images train, 1,000 of its test images judge."""
    space = ImageSpace(channels=1, size=edge, mean=(0.5,), std=(0.5,))
    train, test = (fashion_mnist(space).load(split) for split in ("train", "test"))
    return Pictures(train=_some(train, 12_000), test=_some(test, 1_000))


def _some(images: LabelledImages, count: int) -> tuple[Tensor, Tensor]:
    return images.images[:count].float() / 255, images.labels[:count]


DIGITS = {"load": digits, "epochs": 20, "moved": True}
GARMENTS = {"load": garments, "edge": 28, "mean": 0.286, "std": 0.353, "epochs": 6}
STRANGERS = {
    "residual": Stranger(**DIGITS, edge=16, mean=0.3, std=0.35),
    "tanh": Stranger(**DIGITS, edge=16, mean=0.3, std=0.35),
    "strided": Stranger(**DIGITS, edge=32, mean=0.5, std=0.5),
    "pooled": Stranger(**DIGITS, edge=32, mean=0.5, std=0.5),
    **{
        name: Stranger(**GARMENTS)
        for name in ("linear", "linear_norm", "Recurrent", "mixing", "instance", "logarithms")
    },
}


def write(folder: Path, name: str) -> None:
    """Train a network and write its code, weights and the pictures that judge."""
    stranger = STRANGERS[name]
    pictures = stranger.load(stranger.edge)
    scope: dict = {}
    exec(compile(NETWORKS.read_text(), NETWORKS.name, "exec"), scope)
    torch.manual_seed(0)
    network: nn.Module = scope[name]()
    optimizer, (images, labels) = torch.optim.Adam(network.parameters(), 1e-3), pictures.train
    for _ in range(stranger.epochs):
        for batch in torch.randperm(len(images)).split(32):
            seen = images[batch]
            if stranger.moved:
                seen = seen.roll((int(torch.randint(-2, 3, ())), int(torch.randint(-2, 3, ()))), (2, 3))
            loss = F.cross_entropy(network((seen - stranger.mean) / stranger.std), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(NETWORKS, folder)
    torch.save({"epoch": stranger.epochs, "model_state_dict": network.state_dict()}, folder / "model.pt")
    for number, (image, label) in enumerate(zip(*pictures.test, strict=True)):
        path = folder / "pictures" / str(int(label)) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * image[0]).round().byte().numpy()).save(path)


def called(folder: Path, *arguments: str) -> str:
    """What a command prints.

    Raises:
        subprocess.CalledProcessError: it failed, for a reason that it has printed.
    """
    command = [sys.executable, "-m", "raydfkd", *arguments]
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True, env=os.environ).stdout


def row(folder: Path, name: str, budget: str) -> str:
    """The row of a network."""
    stranger = STRANGERS[name]
    write(folder, name)
    constants = ("--size", str(stranger.edge), "--mean", str(stranger.mean), "--std", str(stranger.std))
    network = ("--network", f"{NETWORKS.stem}:{name}", "--weights", "model.pt")
    called(folder, "init", *network, *constants, "--budget", budget, "--name", "mine")
    report = json.loads(called(folder, "run", "mine.yaml", "--json").splitlines()[-1])
    pictures = f"real_data={{kind: image_folder, root: {folder / 'pictures'}}}"
    judged = json.loads(called(folder, "evaluate", "mine.yaml", "--set", pictures, "--json"))
    estimate = report["student"]["estimate"]
    shares = [judged["teacher"]["top1"], judged["student"]["top1"], judged["agreement"]]
    said = "unknown"
    if estimate["agreement"] is not None:
        said = "{:.1f} ({:.0f} to {:.0f})".format(*(100 * estimate[key] for key in ("agreement", "low", "high")))
    student = report["recipe"]["student"]["network"]
    figures = " | ".join(f"{100 * share:.1f}" for share in shares)
    return f"| {name}, {stranger.edge} px | {student} | {figures} | {said} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--budget", default="100s")
    parser.add_argument("--only", nargs="*", default=list(STRANGERS), choices=list(STRANGERS))
    given = parser.parse_args()
    sys.stdout.write("| network | student's | teacher | student | agreement | estimated |\n|---|---|---|---|---|---|\n")
    for name in given.only:
        sys.stdout.write(f"{row(given.folder.resolve() / name, name, given.budget)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
