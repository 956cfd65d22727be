"""Networks of nobody's zoo, `raydfkd init` and `run` as they are, and what the estimate says beside real digits.

    python tests/report/strangers.py FOLDER [--budget 100s]

Four networks that were written without raydfkd in mind, trained here on scikit-learn's digits at 16 or 32 pixels; the
540 others judge, which neither init nor run is given. Prints a row each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

MODULE = """import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, before, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.short = nn.Conv2d(before, width, 1, stride, bias=False)

    def forward(self, x):
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.short(x))


def residual():
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU(), Block(32, 32, 1), Block(32, 64, 2)),
        *(Block(64, 128, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(128, 10)),
    )


def tanh():
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(20, 50, 3), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(200, 100), nn.Tanh(), nn.Linear(100, 10)),
    )


def strided(width=32):
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU()),
        *(nn.Conv2d(2 * width, 4 * width, 3, 1, 1, bias=False), nn.BatchNorm2d(4 * width), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)),
    )


def pooled(width=16):
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(width, 2 * width, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(72 * width, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
"""
STRANGERS = {"residual": (16, 0.3, 0.35), "tanh": (16, 0.3, 0.35), "strided": (32, 0.5, 0.5), "pooled": (32, 0.5, 0.5)}
"""Function of each network, pixels of an edge, mean and standard deviation."""
EPOCHS = 20


def digits(edge: int) -> tuple[Tensor, Tensor, list[int], list[int]]:
    data = load_digits()
    images = F.interpolate(torch.from_numpy(data.images).float()[:, None] / 16, size=(edge, edge), mode="bilinear")
    train, test = train_test_split(range(len(images)), test_size=540, stratify=data.target, random_state=0)
    return images.clamp(0, 1), torch.from_numpy(data.target).long(), train, test


def write(folder: Path, name: str) -> None:
    edge, mean, std = STRANGERS[name]
    images, labels, train, test = digits(edge)
    scope: dict = {}
    exec(compile(MODULE, "strangers_networks.py", "exec"), scope)
    torch.manual_seed(0)
    network: nn.Module = scope[name]()
    optimizer, rows = torch.optim.Adam(network.parameters(), 1e-3), torch.tensor(train)
    for _ in range(EPOCHS):
        for batch in rows[torch.randperm(len(rows))].split(32):
            moved = images[batch].roll((int(torch.randint(-2, 3, ())), int(torch.randint(-2, 3, ()))), (2, 3))
            loss = F.cross_entropy(network((moved - mean) / std), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "strangers_networks.py").write_text(MODULE)
    torch.save({"epoch": EPOCHS, "model_state_dict": network.state_dict()}, folder / "model.pt")
    for row in test:
        path = folder / "pictures" / str(int(labels[row])) / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * images[row, 0]).round().byte().numpy()).save(path)


def called(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "raydfkd", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, env=os.environ).stdout


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--budget", default="100s")
    given = parser.parse_args()
    lines = ["| network | teacher | student | agreement | estimated |", "|---|---|---|---|---|"]
    for name, (edge, mean, std) in STRANGERS.items():
        folder = given.folder.resolve() / name
        write(folder, name)
        constants = ("--size", str(edge), "--mean", str(mean), "--std", str(std))
        network = ("--network", f"strangers_networks:{name}", "--weights", "model.pt")
        called(folder, "init", *network, *constants, "--budget", given.budget, "--name", "mine")
        report = json.loads(called(folder, "run", "mine.yaml", "--json").splitlines()[-1])
        pictures = f"real_data={{kind: image_folder, root: {folder / 'pictures'}}}"
        judged = json.loads(called(folder, "evaluate", "mine.yaml", "--set", pictures, "--json"))
        estimate = report["student"]["estimate"]
        shares = [judged["teacher"]["top1"], judged["student"]["top1"], judged["agreement"]]
        said = "unknown"
        if estimate["agreement"] is not None:
            said = "{:.1f} ({:.0f} to {:.0f})".format(*(100 * estimate[key] for key in ("agreement", "low", "high")))
        lines.append(f"| {name}, {edge} px | {' | '.join(f'{100 * share:.1f}' for share in shares)} | {said} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
