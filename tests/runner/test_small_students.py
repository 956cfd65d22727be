"""The student that is chosen where a user has named none."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from raydfkd.networks.build import NETWORKS, count_parameters
from raydfkd.networks.flops import forward_flops
from raydfkd.networks.scout import scout
from raydfkd.runner.small_students import kind_for, largest_within

sys.path.append(str(Path(__file__).parents[1] / "report"))  # strangers_networks


@pytest.mark.parametrize(
    ("network", "options", "size", "kind", "chosen"),
    [
        ("lenet5", {}, 32, "plain_cnn", {"widths": [6, 12, 48], "pools": 2, "kernel": 5, "size": 32}),
        ("plain_cnn", {}, 32, "plain_cnn", {"widths": [32, 64, 128], "pools": 2, "size": 32}),
        (
            "resnet_small",
            {"depth": 8, "norm": "group"},
            32,
            "plain_cnn",
            {"widths": [8, 16, 32], "pools": 2, "size": 32},
        ),
        ("resnet_small", {"depth": 8}, 32, "vgg_small", {"widths": [8, 16, 32]}),
        ("vgg_small", {"widths": [8, 16, 32]}, 32, "vgg_small", {"widths": [4, 8, 16]}),
        ("convnet", {"widths": [32, 64, 128]}, 32, "convnet", {"widths": [16, 32, 64], "norm": "batch"}),
        ("convnet", {"norm": "group"}, 32, "convnet", {"widths": [16, 32, 64], "norm": "group"}),
        ("convnet", {"norm": "none"}, 32, "convnet", {"widths": [16, 32, 64], "norm": "none"}),
        ("mobilenet_small", {}, 32, "vgg_small", {"widths": [8, 16, 32]}),
        ("convnet", {"widths": [64, 128, 256]}, 128, "convnet", {"widths": [12, 24, 48, 96, 96]}),
        ("mlp", {"widths": [512, 256]}, 32, "mlp", {"widths": [128, 64], "size": 32}),
        ("vit_small", {}, 32, "plain_cnn", {"widths": [8, 16, 32], "pools": 2, "size": 32}),
    ],
)
def test_student_is_of_a_kind_that_learns_of_the_teacher_and_far_smaller(network, options, size, kind, chosen):
    space = {"channels": 3, "size": size, "mean": [0.5] * 3, "std": [0.5] * 3}
    found = scout(network, options=options, weights="random", given={"classes": 10, "image_space": space})
    found = replace(found, pruned=lambda keep: None)
    section = largest_within(kind_for(found, is_hurried=False), found)
    assert section == {"network": kind, "options": chosen}
    student = NETWORKS.build(kind, chosen, 10, 3, where="student.options")
    if chosen["widths"][0] > 4:  # there is no smaller one
        assert count_parameters(student) <= 0.4 * found.parameters
        assert forward_flops(student, (3, size, size)) <= found.flops()


@pytest.mark.parametrize(
    ("network", "options", "keep"),
    [
        ("lenet5", {}, 0.7),  # of six channels
        ("plain_cnn", {"size": 32, "widths": [3, 32, 64]}, None),
        ("plain_cnn", {"size": 32, "widths": [16, 32, 64]}, 0.5),
        ("resnet_small", {"depth": 8, "norm": "group"}, 0.5),
        ("mobilenet_small", {}, 0.5),
        ("vit_small", {}, 0.5),
        ("mlp", {"widths": [512, 256]}, 0.5),
        ("torchvision:squeezenet1_1", {}, 0.5),
        ("strangers_networks:Recurrent", {}, None),
    ],
)
def test_student_is_the_teacher_with_a_share_of_its_channels_where_that_can_be(network, options, keep):
    channels = 1 if "Recurrent" in network else 3
    space = {"channels": channels, "size": 28 if channels == 1 else 32, "mean": [0.5] * channels}
    space["std"] = space["mean"]
    found = scout(network, options=options, weights="random", given={"classes": 10, "image_space": space})
    kind = kind_for(found, is_hurried=False)
    if keep is None:
        assert kind.network != "pruned_teacher"
    else:
        assert largest_within(kind, found) == {"network": "pruned_teacher", "options": {"keep": keep}}
        assert kind == kind_for(found, is_hurried=True)


def test_student_is_far_smaller_where_nobody_can_count_the_teachers_work():
    space = {"channels": 1, "size": 28, "mean": [0.5], "std": [0.5]}
    found = scout("resnet_small", options={"depth": 8}, weights="random", given={"classes": 10, "image_space": space})
    found = replace(found, pruned=lambda keep: None)
    section = largest_within(kind_for(found, is_hurried=False), replace(found, flops=lambda: math.inf))
    student = NETWORKS.build(section["network"], section["options"], 10, 1, where="student.options")
    assert count_parameters(student) <= 0.4 * found.parameters


def test_in_a_hurry_two_convolutions_are_taken_that_need_few_steps():
    space = {"channels": 1, "size": 28, "mean": [0.5], "std": [0.5]}
    found = scout("resnet_small", options={"depth": 8}, weights="random", given={"classes": 10, "image_space": space})
    found = replace(found, pruned=lambda keep: None)
    slow, fast = (kind_for(found, is_hurried=is_hurried) for is_hurried in (False, True))
    assert (slow.network, fast.network) == ("vgg_small", "plain_cnn")
    assert slow.least_steps > fast.least_steps
