"""Loads the student beside this file: `python load.py PICTURE`, or `from load import load_student, read_picture`."""

import json
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from network import build
from PIL import Image
from torch import Tensor, nn

HERE = Path(__file__).parent
CONFIG = json.loads((HERE / "config.json").read_text(encoding="utf-8"))


def load_student() -> nn.Module:
    """The student in eval mode: normalised images [N, C, H, W], as `read_picture` makes them, to logits [N, K]."""
    network: nn.Module = build()
    network.load_state_dict(safetensors.torch.load_file(HERE / "student.safetensors"))
    return network.eval()


def read_picture(path: str) -> Tensor:
    """A picture file as one normalised image [1, C, H, W]: scaled to cover the size, cut to its centre."""
    space = CONFIG["image_space"]
    height, width = space["height"], space["width"]
    picture = Image.open(path).convert({1: "L", 3: "RGB", 4: "RGBA"}[space["channels"]])
    scale = max(height / picture.height, width / picture.width)
    size = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    picture = picture.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(picture)).reshape(height, width, -1).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(space[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return ((pixels - mean) / std)[None]


if __name__ == "__main__":
    student, image = load_student(), read_picture(sys.argv[1])
    with torch.inference_mode():
        shares, labels = student(image).softmax(1)[0].sort(descending=True)
    for share, label in list(zip(shares.tolist(), labels.tolist(), strict=True))[:5]:
        print(f"{share:6.1%}  {CONFIG['class_names'][label]}")
