"""What a recipe will take before anything is spent: arithmetic, memory, hours on devices, money, bytes on the store."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from raydfkd.config.recipe import Recipe
from raydfkd.config.schema import Precision
from raydfkd.data.commits import GROUP_BYTES
from raydfkd.errors import RecipeError, read_text
from raydfkd.job import asks_student
from raydfkd.networks.build import build_network
from raydfkd.networks.flops import NO_LOAD, Load, load_of
from raydfkd.networks.generators import GENERATORS
from raydfkd.networks.teacher import build_teacher
from raydfkd.runner.here import Here
from raydfkd.runner.memory import HEADROOM, HELD, Memories, Memory
from raydfkd.runner.storage import Answers, Storage, answers_of, storage_of
from raydfkd.runner.trials import Part, parts_of
from raydfkd.synthesis.build import is_live

DEVICES = Path(__file__).parent / "devices.yaml"
HERE = "here"
"""Name of this machine in the table."""
GIB = 2**30
NUMBER_BYTES: dict[Precision, int] = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device of the table."""

    name: str
    peak_tflops: float
    """Dense bfloat16 matrix products, by its maker; of this machine what it has reached."""
    efficiency: float
    """Share of the peak that synthesis reaches."""
    measured: bool
    """Whether ``efficiency`` was measured on such a device."""
    bandwidth_gb_s: float | None
    """Of its memory; None where the table does not say, and then time does not depend on it."""
    memory_gib: float
    is_host: bool
    """Whether the process and its libraries are in the same memory, as on a CPU."""
    usd_per_hour: float | None
    """None where the table has no price."""

    def hours(self, pflop: float, pb: float) -> float:
        """Device-hours of additions and multiplications, or of moving petabytes where that takes longer."""
        arithmetic = pflop * 1e3 / (self.peak_tflops * self.efficiency)
        moving = 0.0 if self.bandwidth_gb_s is None else pb * 1e6 / self.bandwidth_gb_s
        return max(arithmetic, moving) / 3600


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
    synthesis_gib: float
    """Memory of a synthesis worker at its peak."""
    student_gib: float
    """Memory of a train worker at its peak."""
    misfit: str
    """What to change where a worker does not fit into the device's memory; "" where both do."""


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
    synthesis_pb: float
    """Petabytes that matrix products of the synthesis read and write at least."""
    student_pb: float
    """The same of the student's steps."""
    stored: Storage
    answers: Answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A recipe's work, and the memory of its workers."""

    recipe: Recipe
    work: Work
    memory: Memories

    @property
    def workers(self) -> int:
        """Most synthesis workers."""
        return max(1, self.recipe.runtime.workers.max)

    def on(self, device: Device) -> Cost:
        """What it takes on devices of a kind."""
        work = self.work
        return self._cost(
            device,
            device.hours(work.synthesis_pflop, work.synthesis_pb),
            device.hours(work.student_pflop, work.student_pb),
        )

    def here(self, here: Here) -> Cost:
        """What it takes on this machine, which was timed."""
        synthesis_s = here.unit_s * self.work.units
        steps, student_workers = self.recipe.distill.steps, self.recipe.runtime.student_workers.max
        device = Device(
            name=HERE,
            peak_tflops=1e3 * self.work.synthesis_pflop / synthesis_s,
            efficiency=1.0,
            measured=True,
            bandwidth_gb_s=None,
            memory_gib=here.memory_gib,
            is_host=here.device.type == "cpu",
            usd_per_hour=None,
        )
        return self._cost(device, synthesis_s / 3600, here.student_step_s * steps * student_workers / 3600)

    def _cost(self, device: Device, synthesis_hours: float, student_hours: float) -> Cost:
        runtime, price = self.recipe.runtime, device.usd_per_hour
        synthesis, student = (
            _bytes_on(device, memory) / GIB for memory in (self.memory.synthesis, self.memory.student)
        )
        return Cost(
            device=device,
            synthesis_hours=synthesis_hours,
            student_hours=student_hours,
            wall_hours=synthesis_hours / self.workers + student_hours / runtime.student_workers.max,
            usd=None if price is None else price * (synthesis_hours + student_hours),
            synthesis_gib=synthesis,
            student_gib=student,
            misfit=_misfit(self.recipe, self.memory, device),
        )

    def to_json(self, costs: Sequence[Cost]) -> dict[str, Any]:
        """Everything, as plain data."""
        return {**asdict(self.work), "memory": asdict(self.memory), "devices": [asdict(cost) for cost in costs]}


def _bytes_on(device: Device, memory: Memory) -> int:
    return memory.on_host if device.is_host else memory.tensors


def _misfit(recipe: Recipe, memory: Memories, device: Device) -> str:
    runtime, found = recipe.runtime, []
    available = _available(device, runtime.gpus_per_worker, memory.synthesis)
    if memory.synthesis.tensors > available:
        found.append(f"does not fit; {_fewer(memory.synthesis, available)}")
    available = _available(device, runtime.gpus_per_student_worker, memory.student)
    if memory.student.tensors > available:
        most = memory.student.most_images(available)
        parts = -(-memory.student.images * recipe.distill.accumulate // max(1, most))
        remedy = f"raise distill.accumulate to {parts}" if most else "take a smaller student"
        found.append(f"the student does not fit; {remedy}")
    return "; ".join(found)


def _available(device: Device, gpus: float, memory: Memory) -> float:
    """Bytes that a worker's tensors may take: its share of a GPU, or what the process leaves of a CPU's memory."""
    whole = device.memory_gib * GIB
    if device.is_host:
        return (whole - memory.process) / (1 + HELD)
    return (1 - HEADROOM) * whole * (gpus if 0 < gpus < 1 else 1)


def _fewer(memory: Memory, available: float) -> str:
    each = memory.most_images(available) // memory.images_of_one
    return f"lower {memory.key} to {each}" if each else f"not even with {memory.key} 1"


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
    synthesis = sum((_per_image(part, teacher, student) * part.share for part in parts_of(recipe)), NO_LOAD) * images
    shape, spec = recipe.teacher.image_space.shape, recipe.transfer_set
    answer = load_of(teacher, shape)
    answers = answers_of(recipe, images, answer.flops)
    seen = recipe.distill.steps * recipe.distill.batch_size
    learning = load_of(student, shape, backward="weights") * seen + answer * answers.asked
    part_rows = min(spec.part_rows, max(1, GROUP_BYTES // math.prod(recipe.made_space.shape)))
    plan = recipe.plan()
    return Work(
        images=images,
        units=len(plan),
        parts=sum(math.ceil(unit.request.count / part_rows) for unit in plan),
        raw_bytes=images * (math.prod(recipe.made_space.shape) + spec.logits.bytes_of(recipe.teacher.classes)),
        tflop_per_image=synthesis.flops / images / 1e12,
        synthesis_pflop=synthesis.flops / 1e15,
        student_pflop=learning.flops / 1e15,
        synthesis_pb=synthesis.elements * NUMBER_BYTES[recipe.synthesis.precision] / 1e15,
        student_pb=learning.elements * NUMBER_BYTES[recipe.distill.precision] / 1e15,
        stored=storage_of(recipe, images),
        answers=answers,
    )


def _per_image(part: Part, teacher: nn.Module, student: nn.Module) -> Load:
    """The work of an image that a part makes."""
    recipe, options, kind = part.recipe, part.options, part.recipe.synthesis.synthesizer
    asked = [teacher, student] if asks_student(recipe) else [teacher]
    channels, height, width = recipe.teacher.image_space.shape
    if kind in ("procedural_images", "noise_images"):
        return load_of(teacher, (channels, height, width))
    if kind == "pixels":
        stages = [_asked(asked, (channels, *stage.edges((height, width)))) * stage.steps for stage in part.stages]
        return sum(stages, NO_LOAD)
    if kind == "generator":
        chosen = dict(options.get("generator") or {"kind": "conv"})
        network = GENERATORS.build(chosen.pop("kind"), chosen, recipe.made_space, where="synthesis.generator")
        latent = next(module.in_features for module in network.modules() if isinstance(module, nn.Linear))
        each = load_of(network, (latent,), backward="weights") + _asked(asked, (channels, height, width))
        return each * (part.steps_of(part.batches)[0] / _batches(part))
    raise RecipeError(f"synthesis.synthesizer is {kind!r}, whose work plan cannot count; it knows pixels and generator")


def _asked(networks: Sequence[nn.Module], shape: tuple[int, int, int]) -> Load:
    return sum((load_of(network, shape, backward="image") for network in networks), NO_LOAD)


def _batches(part: Part) -> float:
    """Batches for which a part's images of a unit are enough."""
    return part.images_per_class * part.recipe.transfer_set.unit.classes / part.batch.images


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
                bandwidth_gb_s=_number(row, "bandwidth_gb_s"),
                memory_gib=float(row["memory_gib"]),
                is_host=bool(row.get("is_host", False)),
                usd_per_hour=_number(row, "usd_per_hour"),
            )
            for name, row in table.items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(
            f"--devices is {str(path)!r}, which is no table of devices ({error}); see {DEVICES}"
        ) from None
    return rows


def _number(row: dict[str, Any], key: str) -> float | None:
    """A number that the table may leave out."""
    return None if row.get(key) is None else float(row[key])
