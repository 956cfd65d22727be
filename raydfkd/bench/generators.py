"""Speed of many small generators trained as one stack beside the same generators trained one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from raydfkd.bench.ceilings import synchronize
from raydfkd.bench.table import Row, alternate
from raydfkd.config.schema import ImageSpace
from raydfkd.devices import cpu_threads, device_name, keep_freed_memory, pick_device
from raydfkd.networks.generators import GENERATORS, StackedGenerators, StackForm

Step = Callable[[], Tensor]
THEIR_SHARE = 5
"""Our steps in a round for each step one by one, where a thousand generators are a thousand steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorCase:
    """An architecture, and the packs of it that a device is given."""

    size: int
    """Height and width of the images in pixels."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the generator ``conv``."""
    cpu: tuple[tuple[int, int], ...]
    """Classes and images of each, where a step of more would take seconds."""
    cuda: tuple[tuple[int, int], ...]
    """The same, as far as weights, gradients and Adam's moments fit twice, for both ways are held at once."""


CASES: dict[str, GeneratorCase] = {
    "compact-32": GeneratorCase(size=32, cpu=((10, 16), (10, 8), (50, 4)), cuda=((100, 16), (1000, 4))),
    "luo2020-32": GeneratorCase(
        size=32, options={"latent": 1024, "width": 128}, cpu=((4, 8), (8, 2)), cuda=((100, 16), (200, 4))
    ),
    "luo2020-224": GeneratorCase(
        size=224,
        options={"latent": 512, "width": 128, "doublings": 4, "taper": "harmonic"},
        cpu=((2, 2),),
        cuda=((50, 4), (100, 2)),
    ),
}
"""The package's default generator, and those of Luo et al. 2020 for CIFAR and ImageNet."""


def bench_generators(*, rounds: int = 5, device: str = "auto") -> Iterator[Row]:
    """A row for each pack, single-threaded on CPU: classes times training steps per second, against one by one.

    A step is forward and backward of the generators alone, and Adam's update; the teacher behind them costs the same
    either way.
    """
    target = pick_device(device, where="--device")
    if target.type == "cpu":
        keep_freed_memory()
    with cpu_threads(1):
        for name, case in CASES.items():
            for classes, images in case.cuda if target.type == "cuda" else case.cpu:
                yield _bench_pack(f"generators {name}, {classes} x {images}", case, classes, images, target, rounds)


def _bench_pack(name: str, case: GeneratorCase, classes: int, images: int, device: torch.device, rounds: int) -> Row:
    generators = build_generators(case, classes)
    latents = torch.randn(classes, images, case.options.get("latent", 32)).to(device)
    steps = 10 if device.type == "cuda" else 1
    ours = _round(stacked_step(generators, latents), steps * classes, steps, device)
    fewer = max(1, steps // THEIR_SHARE)
    theirs = _round(one_by_one_step(generators, latents), fewer * classes, fewer, device)
    speed, ratio = alternate(ours, theirs, rounds=rounds)
    return Row(
        case=name,
        device=device_name(device),
        steps_per_s=round(speed, 3),
        ratio_fair=ratio,
        note="steps of one class; fair is one by one",
    )


def build_generators(case: GeneratorCase, classes: int) -> list[nn.Module]:
    """Fresh generators, each with weights of its own."""
    space = ImageSpace(channels=3, size=case.size, mean=(0.5,) * 3, std=(0.25,) * 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [GENERATORS.build("conv", case.options, space, where="bench") for _ in range(classes)]


def stacked_step(generators: Sequence[nn.Module], latents: Tensor, form: StackForm = "auto") -> Step:
    """A training step of all generators as one stack; returns the images that it made, [P * N, C, H, W]."""
    stack = StackedGenerators(generators, form=form).to(latents.device)
    optimizer = torch.optim.Adam(stack.parameters(), lr=1e-3, fused=True)

    def step() -> Tensor:
        images: Tensor = stack(latents)
        optimizer.zero_grad()
        (_objective(images) * len(generators)).backward()
        optimizer.step()
        return images.detach()

    return step


def one_by_one_step(generators: Sequence[nn.Module], latents: Tensor) -> Step:
    """The same step, each generator with an optimiser of its own; trains ``generators`` themselves."""
    trained = [generator.to(latents.device) for generator in generators]
    optimizers = [torch.optim.Adam(generator.parameters(), lr=1e-3, fused=True) for generator in trained]

    def step() -> Tensor:
        made = []
        for generator, optimizer, own in zip(trained, optimizers, latents, strict=True):
            images = generator(own)
            optimizer.zero_grad()
            _objective(images).backward()
            optimizer.step()
            made.append(images.detach())
        return torch.cat(made)

    return step


def _objective(images: Tensor) -> Tensor:
    """A mean over images, as every objective is."""
    return (images - 0.25).square().mean()


def _round(step: Step, done: int, steps: int, device: torch.device) -> Callable[[], int]:
    def work() -> int:
        for _ in range(steps):
            step()
        synchronize(device)
        return done

    return work
