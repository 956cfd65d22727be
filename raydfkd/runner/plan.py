"""What a recipe will take before anything is spent: arithmetic, hours on devices, money, bytes on the store."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from raydfkd.config.recipe import Recipe
from raydfkd.errors import RecipeError, read_text
from raydfkd.job import asks_student
from raydfkd.networks.build import build_network
from raydfkd.networks.flops import forward_flops, image_gradient_flops, training_flops
from raydfkd.networks.generators import GENERATORS
from raydfkd.networks.teacher import build_teacher
from raydfkd.synthesis.build import is_live

DEVICES = Path(__file__).parent / "devices.yaml"
LOGIT_BYTES = 2
"""Of each stored logit, float16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device of the table."""

    name: str
    peak_tflops: float
    """Dense bfloat16 matrix products, by its maker."""
    efficiency: float
    """Share of the peak that synthesis reaches."""
    measured: bool
    """Whether ``efficiency`` was measured on such a device."""
    memory_gib: float
    usd_per_hour: float | None
    """None where the table has no price."""

    def hours(self, flops: float) -> float:
        """Device-hours of so many additions and multiplications."""
        return flops / (self.peak_tflops * self.efficiency * 1e12) / 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a recipe takes on a device."""

    device: Device
    synthesis_hours: float
    """Device-hours."""
    student_hours: float
    """Device-hours."""
    wall_hours: float
    """With as many workers as the recipe allows, one device each, images first: an upper bound, for the student learns
    meanwhile."""
    usd: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a recipe makes and computes, wherever it runs."""

    images: int
    units: int
    parts: int
    """Files of the set."""
    raw_bytes: int
    """Of pixels and logits as they are; png, jpeg and webp take less."""
    tflop_per_image: float
    """Synthesis, by image that is kept."""
    synthesis_pflop: float
    student_pflop: float
    """The student's steps, the teacher's answers included."""

    def on(self, device: Device, *, workers: int, student_workers: int) -> Cost:
        """What that takes on as many devices."""
        synthesis, student = device.hours(1e15 * self.synthesis_pflop), device.hours(1e15 * self.student_pflop)
        price = device.usd_per_hour
        return Cost(
            device=device,
            synthesis_hours=synthesis,
            student_hours=student,
            wall_hours=synthesis / workers + student / student_workers,
            usd=None if price is None else price * (synthesis + student),
        )

    def to_json(self, costs: list[Cost]) -> dict[str, Any]:
        """Everything, as plain data."""
        return {**asdict(self), "devices": [asdict(cost) for cost in costs]}


def work_of(recipe: Recipe) -> Work:
    """Count a recipe's work; nothing is run, and weights need not be there.

    Raises:
        RecipeError: the recipe is wrong, or its synthesizer is none whose work is known.
    """
    if is_live(recipe):
        raise RecipeError(
            "distill.source is live: its images are made between the student's steps and not counted here"
        )
    teacher = build_teacher(recipe)
    student = build_network(recipe.student, recipe.teacher, where="student", seed=0)
    images = recipe.transfer_set.images_per_class * len(recipe.classes)
    if not images:
        raise RecipeError("transfer_set.images_per_class is missing; say how many images to make of each class")
    synthesis = sum(_synthesis(recipe, teacher, student))
    shape, spec = recipe.teacher.image_space.shape, recipe.transfer_set
    step = training_flops(student, shape) + forward_flops(teacher, shape)
    plan = recipe.plan()
    return Work(
        images=images,
        units=len(plan),
        parts=sum(math.ceil(unit.request.count / spec.part_rows) for unit in plan),
        raw_bytes=images * (math.prod(recipe.made_space.shape) + LOGIT_BYTES * recipe.teacher.classes),
        tflop_per_image=synthesis / images / 1e12,
        synthesis_pflop=synthesis / 1e15,
        student_pflop=recipe.distill.steps * recipe.distill.batch_size * step / 1e15,
    )


def _synthesis(recipe: Recipe, teacher: nn.Module, student: nn.Module) -> Iterator[float]:
    """Work of the section's own synthesizer and of those beside it, for the whole set."""
    spec = recipe.synthesis
    images = recipe.transfer_set.images_per_class * len(recipe.classes)
    beside = sum(other.images for other in spec.beside)
    own = images / (1 + beside)
    made = own if spec.select is None else own * spec.select.candidates
    asked = [teacher, student] if asks_student(recipe) else [teacher]
    options = spec.model_dump(mode="json")
    yield made * _per_image(recipe, spec.synthesizer, options, asked)
    for other in spec.beside:
        candidates = 1.0 if other.select is None else other.select.candidates
        yield own * other.images * candidates * _per_image(recipe, other.kind, dict(other.options), asked)


def _per_image(recipe: Recipe, kind: str, options: Mapping[str, Any], asked: list[nn.Module]) -> float:
    channels, height, width = recipe.teacher.image_space.shape
    if kind in ("procedural_images", "noise_images"):
        return forward_flops(asked[0], (channels, height, width))
    if kind == "pixels":
        total = 0.0
        for stage in options["stages"]:
            pool = stage.get("pool", 1)
            shape = (channels, height // pool, width // pool)
            total += stage["steps"] * sum(image_gradient_flops(network, shape) for network in asked)
        return total
    if kind == "generator":
        unit = recipe.transfer_set.unit
        steps, batch, renewal = options["steps"], options["batch_per_class"], options.get("renewal")
        batches: float
        if renewal is not None:
            share = 1 / (1 + sum(other.images for other in recipe.synthesis.beside))
            batches = math.ceil(unit.images_per_class * share / batch)
            steps += renewal["steps"] * (batches - 1)
        else:
            batches = unit.images_per_class / batch
        if recipe.synthesis.targets.kind == "none":
            batches *= unit.classes
        chosen = dict(options.get("generator") or {"kind": "conv"})
        network = GENERATORS.build(chosen.pop("kind"), chosen, recipe.made_space, where="synthesis.generator")
        latent = next(module.in_features for module in network.modules() if isinstance(module, nn.Linear))
        each = training_flops(network, (latent,)) + sum(
            image_gradient_flops(one, (channels, height, width)) for one in asked
        )
        return float(each * steps / batches)
    raise RecipeError(f"synthesis.synthesizer is {kind!r}, whose work plan cannot count; it knows pixels and generator")


def checkpoint_share(recipe: Recipe) -> float:
    """Share of a unit's work between two checkpoints of it; 1 where there is none."""
    options = recipe.synthesis.model_dump(mode="json")
    steps: int = sum(stage["steps"] for stage in options["stages"]) if "stages" in options else options.get("steps", 1)
    return min(1.0, recipe.runtime.checkpoint_every / steps)


def devices_in(path: Path = DEVICES) -> list[Device]:
    """The table of devices in a file of YAML, the packaged one unless another is named.

    Raises:
        RecipeError: it is no such table.
    """
    try:
        table = yaml.safe_load(read_text(path, f"--devices is {str(path)!r}"))
        rows = [
            Device(
                name=name,
                peak_tflops=float(row["peak_tflops"]),
                efficiency=float(row["efficiency"]),
                measured=bool(row.get("measured", False)),
                memory_gib=float(row["memory_gib"]),
                usd_per_hour=None if row.get("usd_per_hour") is None else float(row["usd_per_hour"]),
            )
            for name, row in table.items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(
            f"--devices is {str(path)!r}, which is no table of devices ({error}); see {DEVICES}"
        ) from None
    return rows
