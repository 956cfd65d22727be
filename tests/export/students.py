"""Students as a run leaves them, without the run."""

from __future__ import annotations

import json

from torch import nn
from toy import batchnorm_teacher, toy_recipe

from raydfkd.networks.build import build_network
from raydfkd.networks.weights import save_bytes
from raydfkd.runner.run import student_path

NAMES = ("cat", "dog", "horse", "bird")


class Probabilities(nn.Module):
    """A student whose author had it answer a record of probabilities."""

    def __init__(self):
        super().__init__()
        self.body = batchnorm_teacher()

    def forward(self, images):
        return {"features": images, "output": self.body(images).softmax(1)}


class Forgetful(nn.Module):
    """A student that no file holds: what it answers depends on more than its weights."""

    made = 0

    def __init__(self):
        super().__init__()
        Forgetful.made += 1
        self.number = Forgetful.made
        self.head = nn.Linear(64, 4)

    def forward(self, images):
        return self.head(images.flatten(1)) * self.number


class Reads(nn.Module):
    """A student that looks at its images in Python, which no graph can repeat."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 4)

    def forward(self, images):
        return self.head(images.flatten(1)) * (2 if float(images.mean()) > 0 else 1)


def plain(width=3):
    """A network of PyTorch's own parts."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 4))


def timm_student():
    """A small model of timm's."""
    import timm

    return timm.create_model("test_vit3", num_classes=4, in_chans=1, img_size=8, patch_size=4)


def hf_student():
    """A small model of transformers."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=4
        )
    )


def saved_student(folder, *settings, report=None):
    """A recipe whose run_dir has a student, with weights that no seed of the package gives, and a ``report``."""
    recipe = toy_recipe(folder, [f"teacher.class_names={list(NAMES)}", *settings])
    network = build_network(recipe.student, recipe.teacher, where="student", seed=99)
    path = student_path(recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save_bytes(network, {"recipe": json.dumps(recipe.shown()), "digest": "d1"}))
    (path.parent / "recipe.yaml").write_text(recipe.to_yaml())
    if report is not None:
        content = {"recipe": recipe.shown(), "images": 24, "seconds": {}, "units": {}, **report}
        (path.parent / "report.json").write_text(json.dumps(content))
    return recipe


def of_network(network):
    """Settings for a student of this network."""
    name = network if ":" in network else f"{__name__}:{network}"
    return f"student={{network: '{name}', options: {{}}}}"
