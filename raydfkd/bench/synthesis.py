"""Speed of pixel synthesis beside the loop as published."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from raydfkd.bench.published import published_loop
from raydfkd.bench.table import Row, alternate
from raydfkd.networks import build_network
from raydfkd.pipeline import device_name
from raydfkd.recipe import Recipe
from raydfkd.schedule import Request
from raydfkd.synthesis.worker import build_synthesizer, cpu_threads, keep_freed_memory, pick_device

CASES: dict[str, dict[str, Any]] = {
    "convnet-32": {"network": "convnet", "channels": 1, "size": 32, "batch": 100, "classes": 10},
    "resnet20-32": {"network": "resnet_small", "channels": 1, "size": 32, "batch": 64, "classes": 8},
}
"""The quickstart's teacher, and a deeper one. Weights are random: speed does not depend on them."""


def bench_synthesis(*, rounds: int = 7, steps: int = 10, device: str = "auto") -> Iterator[Row]:
    """One row a case, single-threaded on CPU: our steps per second and their ratio to the published loop's."""
    target = pick_device(device)
    if target.type == "cpu":
        keep_freed_memory()
    for name, case in CASES.items():
        recipe = _recipe(case, steps)
        teacher = build_network(recipe.teacher, recipe.teacher, where="teacher", seed=0)
        _settle_batchnorm(teacher, recipe.teacher.image_space.shape)
        synthesizer = build_synthesizer(recipe, teacher, target)
        classes = tuple(range(case["classes"]))
        request = Request(classes=classes, images_per_class=case["batch"] // len(classes), seed=0, class_seeds=classes)
        shape = (request.count, *recipe.teacher.image_space.shape)
        targets = torch.tensor(classes, device=target).repeat_interleave(request.images_per_class)
        published = published_loop(teacher.to(target), torch.randn(shape, device=target), targets, lr=0.1)

        def ours(synthesizer: Any = synthesizer, request: Request = request) -> int:
            list(synthesizer.produce(request, lambda _: None))
            return steps

        def theirs(published: Any = published) -> int:
            for _ in range(steps):
                published()
            return steps

        with cpu_threads(1):
            speed, _, ratio = alternate(ours, theirs, rounds=rounds)
        yield Row(
            case=f"synthesis {name} batch {request.count}",
            device=device_name(target),
            steps_per_s=round(speed, 3),
            ratio_published=round(ratio, 3),
        )


def _recipe(case: dict[str, Any], steps: int) -> Recipe:
    channels, size = case["channels"], case["size"]
    return Recipe.model_validate(
        {
            "name": "bench",
            "teacher": {
                "network": case["network"],
                "classes": case["classes"],
                "weights": "random",
                "image_space": {
                    "channels": channels,
                    "size": size,
                    "mean": (0.5,) * channels,
                    "std": (0.25,) * channels,
                },
            },
            "student": {"network": case["network"]},
            "synthesis": {
                "synthesizer": "pixels",
                "batch_size": case["batch"],
                "stages": [{"steps": steps}],
                "augment": ({"kind": "jitter", "pixels": 2},),
                "objective": (
                    {"term": "cross_entropy"},
                    {"term": "bn_moments"},
                    {"term": "total_variation", "weight": 1e-3},
                    {"term": "image_l2", "weight": 1e-5},
                ),
            },
            "transfer_set": {"images_per_class": 1, "unit": {"classes": 1, "images_per_class": 1}},
            "distill": {"steps": 1, "criterion": "soft_kl", "optimizer": {"lr": 1e-3}},
        }
    )


@torch.no_grad()
def _settle_batchnorm(teacher: nn.Module, shape: tuple[int, int, int]) -> None:
    """Give untrained BatchNorm layers statistics of a plausible size."""
    teacher.train()
    for _ in range(20):
        teacher(torch.randn(64, *shape))
    teacher.eval()
