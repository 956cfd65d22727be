"""One worker: a recipe and a unit in, a commit out. Knows nothing of Ray."""

from __future__ import annotations

import ctypes
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn

from raydfkd.data.commits import Commit
from raydfkd.data.transfer_set import TransferSet
from raydfkd.images import PixelRange
from raydfkd.losses.objective import build_objective
from raydfkd.networks import build_network, load_weights
from raydfkd.observed import ObservedNetwork
from raydfkd.recipe import Recipe
from raydfkd.registry import RecipeError
from raydfkd.schedule import WorkUnit, derive_seed
from raydfkd.synthesis.augment import build_augmentations
from raydfkd.synthesis.synthesizer import SYNTHESIZERS, Judge, Setting, Synthesizer
from raydfkd.synthesis.targets import TARGETS

logger = logging.getLogger(__name__)


def pick_device(wanted: str) -> torch.device:
    """The device of this process: what the recipe says, or CUDA where there is some for ``auto``."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RecipeError("runtime.device is 'cuda', but this machine has no CUDA device; use auto or cpu")
    return torch.device(wanted)


def load_teacher(recipe: Recipe) -> tuple[nn.Module, str]:
    """The recipe's teacher with its weights, and their SHA-256."""
    seed = derive_seed(recipe.seed, "teacher")
    teacher = build_network(recipe.teacher, recipe.teacher, where="teacher", seed=seed)
    return teacher, load_weights(teacher, recipe.teacher.weights, where="teacher.weights")


def build_synthesizer(recipe: Recipe, teacher: nn.Module, device: torch.device) -> Synthesizer:
    """Put judge and synthesizer together as the recipe says.

    Raises:
        RecipeError: anything in ``synthesis`` that is unknown, of the wrong type or does not suit the teacher.
    """
    spec = recipe.synthesis
    targets = TARGETS.build(spec.targets.kind, spec.targets.options, where="synthesis.targets")
    objective = build_objective(
        spec.objective,
        has_targets=targets.is_conditional,
        has_latents=spec.synthesizer == "generator",
        has_student=False,
    ).to(device)
    observed = ObservedNetwork(
        teacher,
        taps=objective.needs,
        frozen=True,
        precision=getattr(torch, spec.precision),
        compiled=device.type == "cuda" if spec.compile == "auto" else spec.compile,
    ).to(device)
    pixels = PixelRange(recipe.teacher.image_space, device)
    setting = Setting(
        judge=Judge(teacher=observed, objective=objective, pixels=pixels),
        space=recipe.teacher.image_space,
        targets=targets,
        augment=build_augmentations(spec.augment, where="synthesis.augment"),
        device=device,
    )
    return SYNTHESIZERS.build(spec.synthesizer, spec.options, setting, where="synthesis")


class SynthesisWorker:
    """Works on one unit after another; everything expensive is built once."""

    def __init__(self, recipe: Recipe, transfer_set: TransferSet, *, device: torch.device) -> None:
        if device.type == "cpu":
            keep_freed_memory()
        teacher, weights = load_teacher(recipe)
        digest = recipe.digest(weights)
        if digest != transfer_set.digest:
            raise RecipeError(
                f"teacher.weights is {recipe.teacher.weights!r}: not the weights that this run began with; "
                "restore them or use another run_dir"
            )
        self._threads = recipe.synthesis.threads
        self._transfer_set = transfer_set
        self._synthesizer = build_synthesizer(recipe, teacher, device)

    def run(self, unit: WorkUnit, attempt: int = 1) -> Commit:
        """Make the images of ``unit`` and commit them; on any error nothing of the attempt remains."""
        started = time.monotonic()
        curve: list[dict[str, float]] = []
        sink = self._transfer_set.open(unit, attempt=attempt)
        try:
            with cpu_threads(self._threads):
                for batch in self._synthesizer.produce(unit.request, lambda entry: curve.append(dict(entry))):
                    sink.write(batch)
            commit = sink.commit(seconds=time.monotonic() - started, curve=curve)
        except BaseException:
            sink.abandon()
            raise
        logger.info("unit %s committed: %d images, objective %.3f", unit.id, commit.images, commit.objective)
        return commit


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute with ``count`` CPU threads: a different split of a sum is a different last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def keep_freed_memory() -> None:
    """Tell glibc to reuse large blocks instead of returning them to the system after every operation.

    A training step on CPU allocates the same few megabytes over and over; without this each of them is mapped and
    cleared by the kernel again, which costs more than small convolutions do. Elsewhere than on glibc: no effect.
    """
    if not sys.platform.startswith("linux"):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, (1 << 31) - 1)
