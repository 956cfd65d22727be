"""Toy networks, recipes and views that the tests share: 4 classes of 8x8 grey images, milliseconds a step."""

from __future__ import annotations

import copy
import inspect
import itertools
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from raydfkd.config.families import REGISTRIES
from raydfkd.config.load import load_recipe
from raydfkd.config.recipe import Recipe
from raydfkd.config.registry import Registry
from raydfkd.config.schema import ImageSpace
from raydfkd.data.batches import SyntheticBatch
from raydfkd.data.encodings import Encoding
from raydfkd.data.shards import RAW, encode_rows, write_part
from raydfkd.distillation.trainer import TrainingHooks
from raydfkd.distillation.training import StudentTraining
from raydfkd.errors import RecipeError
from raydfkd.images.pixels import PixelRange
from raydfkd.job import Job, SynthesisOutcome, open_job
from raydfkd.losses.objective import View
from raydfkd.networks.observed import Need, Observation, ObservedNetwork
from raydfkd.networks.small import ConvNet
from raydfkd.networks.student import fresh_student
from raydfkd.networks.teacher import open_teacher
from raydfkd.networks.weights import save_bytes
from raydfkd.report.metrics import MetricsLog
from raydfkd.runner.events import Events, MetricsWriter
from raydfkd.runner.local import LocalExecutor
from raydfkd.synthesis.build import build_synthesizer
from raydfkd.synthesis.checkpoint import Interrupted
from raydfkd.synthesis.worker import SynthesisWorker
from raydfkd.units import Phase, Request, WorkUnit

CLASSES = 4
SPACE = ImageSpace(channels=1, size=8, mean=(0.4,), std=(0.3,))
FAMILIES: dict[str, Registry[Any]] = {family: pkgutil.resolve_name(place) for family, place in REGISTRIES.items()}
BATCHNORM_TAPS = frozenset({Need.FEATURES, Need.MOMENTS})

_RECIPE = """
name: toy
seed: 7
teacher:
  network: convnet
  options: {widths: [8, 12]}
  classes: 4
  image_space: {channels: 1, size: 8, mean: [0.4], std: [0.3]}
student:
  network: convnet
  options: {widths: [4, 6]}
transfer_set:
  images_per_class: 6
  unit: {classes: 2, images_per_class: 3}
distill:
  steps: 6
  batch_size: 8
  holdout: 0
  criterion: logit_l1
  optimizer: {kind: adam, lr: 1e-2}
  log_every: 1
runtime: {executor: local, device: cpu}
synthesis:
"""
_SYNTHESIS = {
    "pixels": """
  synthesizer: pixels
  batch_size: 4
  stages: [{pool: 2, steps: 2}, {steps: 2}]
  warmup: 1
  augment: [{kind: jitter, pixels: 1}]
  objective: [cross_entropy, {term: bn_moments, form: kl}, {term: total_variation, weight: 1e-2}]
""",
    "generator": """
  synthesizer: generator
  steps: 6
  batch_per_class: 2
  emissions: 2
  generator: {kind: conv, latent: 4, width: 4, doublings: 1}
  augment: [{kind: jitter, pixels: 1}]
  objective: [cross_entropy, {term: bn_moments, form: kl}]
""",
}
SYNTHESIZERS_UNDER_TEST = tuple(_SYNTHESIS)


class PlainNet(nn.Module):
    """A network without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten())
        self.head = nn.Linear(6 * 16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images))
        return logits


class TinyViT(nn.Module):
    """A vision transformer of 16 patches and a class token, two blocks of two heads."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 8, 2, stride=2)
        self.class_token = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 17, 8))
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(8, heads, 16, dropout=0, batch_first=True, norm_first=True) for _ in range(2))
        )
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(patches), -1, -1), patches], 1) + self.position
        logits: Tensor = self.head(self.blocks(tokens)[:, 0])
        return logits


def attention_teacher(seed: int = 0, heads: int = 2) -> TinyViT:
    """A teacher with self-attention, whose blocks look at patches as differently as trained ones do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TinyViT(heads)
        with torch.no_grad():
            for block in network.blocks:
                assert isinstance(block, nn.TransformerEncoderLayer)
                block.self_attn.in_proj_weight *= 4
        return network.eval()


def batchnorm_teacher(seed: int = 0) -> ConvNet:
    """A network whose BatchNorm layers have running statistics and affine weights unlike those of a fresh one."""
    return copy.deepcopy(_batchnorm_teacher(seed))


@cache
def _batchnorm_teacher(seed: int) -> ConvNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ConvNet(CLASSES, 1, widths=(8, 12))
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, std=0.3)
        with torch.no_grad():
            network.head.weight *= 4
            for _ in range(20):
                network(1.5 * torch.randn(32, 1, 8, 8) + 0.3)
    return network.eval()


def plain_teacher(seed: int = 0) -> PlainNet:
    """A teacher without BatchNorm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PlainNet().eval()


def save_pictures(folder: Path, count: int, seed: int = 0) -> Tensor:
    """Write ``count`` grey pictures of 8x8 pixels, and return them, uint8 [N, 1, 8, 8]: slopes of any direction."""
    folder.mkdir(parents=True, exist_ok=True)
    directions = torch.randn(count, 2, 1, 1, generator=torch.Generator().manual_seed(seed))
    row = torch.linspace(-1, 1, 8)
    slopes = directions[:, 0] * row[:, None] + directions[:, 1] * row
    images = (127.5 + 60 * slopes).round().clamp(0, 255).byte()
    for index, image in enumerate(images):
        Image.fromarray(image.numpy()).save(folder / f"{index:03}.png")
    return images[:, None]


class SmallMemory(ConvNet):
    """A teacher on a device that has no memory for the gradient of more than ``room`` images."""

    def __init__(self, room, error):
        super().__init__(CLASSES, 1, widths=(4,))
        self.room, self.error = room, error

    def forward(self, images):
        if images.requires_grad and len(images) > self.room:
            raise self.error
        return super().forward(images)


def encode_part(
    batches: Sequence[SyntheticBatch], *, unit: str, seed: int, first_index: int, encoding: Encoding = RAW
) -> bytes:
    """Write checked batches as one Parquet file, of raw pixels unless told; see ``encode_rows`` and ``write_part``."""
    tables, index = [], first_index
    for batch in batches:
        tables.append(encode_rows(batch, unit=unit, seed=seed, first_index=index, encoding=encoding))
        index += len(batch)
    return write_part(tables)


def toy_images(count: int, seed: int = 0) -> Tensor:
    """Normalised images [N, 1, 8, 8] that want a gradient."""
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def toy_view(
    images: Tensor | None = None,
    targets: Tensor | None = None,
    *,
    teacher: nn.Module | None = None,
    taps: frozenset[Need] = BATCHNORM_TAPS,
    groups: int = 1,
) -> View:
    """A view that offers everything a term may read."""
    images = toy_images(6) if images is None else images
    targets = torch.arange(len(images)) % CLASSES if targets is None else targets
    observed = ObservedNetwork(batchnorm_teacher() if teacher is None else teacher, taps=taps, frozen=True)
    return View(
        images=images,
        targets=targets,
        teacher=observed(images, groups=groups),
        observe=observed,
        student=Observation(logits=plain_teacher(seed=1)(images)),
        latents=images.flatten(1)[:, :5],
        seen=PixelRange(SPACE).from_nominal(images),
        groups=groups,
    )


def toy_recipe(folder: Path, overrides: Sequence[str] = (), *, synthesizer: str = "pixels") -> Recipe:
    """A recipe that lives in ``folder``, whose teacher is ``batchnorm_teacher()``; four units of six images."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "teacher.safetensors"
    weights.write_bytes(save_bytes(batchnorm_teacher()))
    source = folder / "toy.yaml"
    source.write_text(_RECIPE + _SYNTHESIS[synthesizer])
    return load_recipe(source, [f"teacher.weights={weights}", *overrides], run_dir=str(folder / "run"))


def batches_of(recipe: Recipe, unit: WorkUnit | None = None, log: Any = lambda _: None) -> list[SyntheticBatch]:
    """What the recipe's synthesizer makes of ``unit``, the first one unless given."""
    teacher = open_teacher(recipe).module
    synthesizer = build_synthesizer(recipe, teacher, torch.device("cpu"))
    return list(synthesizer.produce((unit or recipe.plan()[0]).request, log))


def joined(batches: Sequence[SyntheticBatch]) -> SyntheticBatch:
    """All rows of ``batches`` as one."""
    return SyntheticBatch(
        images=torch.cat([batch.images for batch in batches]),
        labels=torch.cat([batch.labels for batch in batches]),
        teacher_logits=torch.cat([batch.teacher_logits for batch in batches]),
        objective=batches[-1].objective,
    )


def assert_same_rows(one: SyntheticBatch, other: SyntheticBatch) -> None:
    """Bit for bit."""
    for name in ("images", "labels", "teacher_logits"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0)


def quiet_events(folder: Path) -> Events:
    """Events that nobody sees and ``metrics.jsonl`` keeps."""
    return Events(MetricsWriter(MetricsLog(folder / "metrics.jsonl", fresh=False)))


def synthesize_here(job: Job, events: Events, phase: Phase | None = None) -> SynthesisOutcome:
    """Make a job's images in this process."""
    return LocalExecutor().synthesize(job, phase or job.phases[-1], open_teacher(job.recipe), events)


def distill_here(job: Job, events: Events, phase: Phase | None = None) -> Mapping[str, Tensor]:
    """Train a job's student in this process."""
    return LocalExecutor().distill(job, phase or job.phases[-1], open_teacher(job.recipe), events)


def run_here(job: Job, events: Events) -> tuple[SynthesisOutcome, Mapping[str, Tensor]]:
    """Both, phase by phase."""
    return LocalExecutor().run(job, open_teacher(job.recipe), events)


def worker_of(job: Job, **arguments: Any) -> SynthesisWorker:
    """A worker of a job in this process."""
    return SynthesisWorker(job, open_teacher(job.recipe), device=torch.device("cpu"), **arguments)


def contents_of_interrupted(folder: Path, settings: Sequence[str], *, synthesizer: str, after: int) -> tuple[str, str]:
    """Digests of a first unit of six images a class: left after some steps and gone on with, and undisturbed."""
    sizes = ("transfer_set.images_per_class=6", "transfer_set.unit.images_per_class=6")

    def job_of(name: str) -> Job:
        job = open_job(toy_recipe(folder / name, [*settings, *sizes], synthesizer=synthesizer))
        job.transfer_set.create()
        return job

    undisturbed, job = job_of("undisturbed"), job_of("disturbed")
    expected = worker_of(undisturbed).run(undisturbed.units[0])
    asked = iter(range(1000))
    worker = worker_of(job, should_stop=lambda: next(asked) >= after)
    with pytest.raises(Interrupted):
        worker.run(job.units[0])
    return worker_of(job).run(job.units[0]).content, expected.content


def training_of(job: Job, phase: Phase | None = None, **hooks: Any) -> StudentTraining:
    """A job's student training in this process, with these hooks."""
    given = TrainingHooks(**{"on_log": lambda _: None, **hooks})
    return StudentTraining(job, open_teacher(job.recipe), phase or job.phases[-1], hooks=given)


def fresh_student_of(job: Job) -> nn.Module:
    """The student before its training."""
    return fresh_student(job.recipe, open_teacher(job.recipe).module)


def shipped(registry: Registry[Any]) -> list[str]:
    """Plug-ins of the package, without those that tests register."""
    return [name for name in registry.names() if registry.get(name, where="test").__module__.startswith("raydfkd.")]


REQUIRED: dict[str, dict[str, Any]] = {"exponential_increment": {"of": "one_hot"}}
"""Options that plug-ins have no default for."""


def variants(registry: Registry[Any], name: str, *supplied: Any) -> Iterator[dict[str, Any]]:
    """Options of plug-in ``name``: every combination of its closed choices that it accepts."""
    factory = registry.get(name, where="test")
    hints = get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)  # type: ignore[misc]
    choices = {option: get_args(hint) for option, hint in hints.items() if get_origin(hint) is Literal}
    for values in itertools.product(*choices.values()):
        options = REQUIRED.get(name, {}) | dict(zip(choices, values, strict=True))
        try:
            registry.build(name, options, *supplied, where="test")
        except RecipeError:
            continue
        yield options


def unit_of(classes: tuple[int, ...], images_per_class: int, seed: int = 1) -> WorkUnit:
    """A unit whose seeds are easy to tell apart."""
    request = Request(
        classes=classes,
        images_per_class=images_per_class,
        seed=seed,
        class_seeds=tuple(100 * seed + label for label in classes),
    )
    return WorkUnit(id="test", request=request)
