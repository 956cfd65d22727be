"""Speed of a student's training on a transfer set beside the same training on batches that are in memory."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from raydfkd.bench.ceilings import synchronize
from raydfkd.bench.shards import CLASSES, random_batch, write_unit
from raydfkd.bench.table import Row, alternate
from raydfkd.config.schema import DistillSpec, ImageSpace, StudentSpec, TeacherSpec
from raydfkd.data.set_source import GrowingSource
from raydfkd.data.sources import BatchSource, Feed, StudentBatch
from raydfkd.data.transfer_set import TransferSet
from raydfkd.devices import cpu_threads, device_name, keep_freed_memory, pick_device
from raydfkd.distillation.trainer import StepHooks, StudentTrainer
from raydfkd.images.pixels import PixelRange
from raydfkd.networks.build import build_network
from raydfkd.networks.observed import ObservedNetwork
from raydfkd.units import plan_name


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentCase:
    """A student that is cheap for its images, so that feeding it is hard."""

    network: str
    size: int
    """Height and width of the images in pixels."""
    rows: int
    """Images of the set, one epoch a round."""
    batch_size: int
    options: dict[str, Any] = field(default_factory=dict)
    """Keywords of the network's constructor."""


CPU_CASES = (
    StudentCase(network="convnet", size=32, rows=4096, batch_size=128),
    StudentCase(network="convnet", size=224, rows=128, batch_size=16, options={"widths": (8, 16)}),
)
CUDA_CASES = (
    StudentCase(network="resnet_small", size=32, rows=40_960, batch_size=256),
    StudentCase(network="torchvision:resnet18", size=224, rows=8192, batch_size=256),
)


class MemorySource:
    """The same batches over and over, which is the cheapest feeding."""

    is_live: ClassVar[bool] = False

    def __init__(self, batches: list[StudentBatch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[StudentBatch]:
        """Batches without end."""
        return itertools.cycle(self._batches)

    def state_dict(self) -> dict[str, Any]:
        """An empty state, since it always begins again."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin again."""

    def start_over(self) -> None:
        """Begin again."""

    def finish(self) -> None:
        """Do nothing, since nothing is left to do."""


def bench_student(*, rounds: int = 5, device: str = "auto") -> Iterator[Row]:
    """Images per second of training on a set on the local disk, and their ratio to training from memory.

    A round is one epoch. The students use stored logits and no augmentation, so that nothing but the student's own
    steps hides the feeding; on CPU, where both share the processor, with one thread.
    """
    target = pick_device(device, where="--device")
    if target.type == "cpu":
        keep_freed_memory()
    with cpu_threads(1):
        for case in CUDA_CASES if target.type == "cuda" else CPU_CASES:
            yield _bench_case(case, target, rounds)


def _bench_case(case: StudentCase, device: torch.device, rounds: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        transfer_set = TransferSet(folder, digest="bench")
        transfer_set.create()
        write_unit(transfer_set, "u0", [random_batch(case.rows, case.size)])
        steps = case.rows // case.batch_size
        feed = Feed(
            transfer_set=transfer_set,
            units=["u0"],
            planned_images=case.rows,
            plan=plan_name(["u0"]),
            image_bytes=3 * case.size**2,
            steps=steps,
            batch_size=case.batch_size,
            seed=0,
            pin_memory=device.type == "cuda",
        )
        stored = GrowingSource(feed)
        memory = MemorySource(list(itertools.islice(stored, steps)))
        trainers = [_trainer(case, device) for _ in range(2)]

        def train(trainer: StudentTrainer, source: BatchSource) -> int:
            trainer.fit(source, steps=trainer.step + steps)
            synchronize(device)
            return case.rows

        speed, ratio = alternate(lambda: train(trainers[0], stored), lambda: train(trainers[1], memory), rounds=rounds)
    return Row(
        case=f"student {case.network} {case.size} px batch {case.batch_size}",
        device=device_name(device),
        rows_per_s=round(speed),
        ratio_raw=ratio,
        note="raw is the same batches from memory",
    )


def _trainer(case: StudentCase, device: torch.device) -> StudentTrainer:
    space = ImageSpace(channels=3, size=case.size, mean=(0.5,) * 3, std=(0.25,) * 3)
    teacher = TeacherSpec(network="convnet", classes=CLASSES, image_space=space, weights="random")
    spec = StudentSpec(network=case.network, options=case.options)
    student = build_network(spec, teacher, where="student", seed=0).to(device)
    return StudentTrainer(
        student,
        ObservedNetwork(nn.Identity(), frozen=True),
        DistillSpec.model_validate(
            {
                "steps": 10**6,
                "criterion": "soft_kl",
                "optimizer": {"kind": "sgd", "lr": 1e-3, "schedule": "constant"},
                "teacher_logits": "stored",
                "log_every": 10**6,
                "checkpoint_every": 10**6,
            }
        ),
        pixels=PixelRange(space, device),
        device=device,
        seed=0,
        hooks=StepHooks(on_log=lambda _: None),
    )
