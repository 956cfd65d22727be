"""Memory that a worker takes at its peak, from trials on a few images whose tensors are counted as they come and go."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from raydfkd.config.recipe import Recipe
from raydfkd.devices import cpu_threads
from raydfkd.networks.teacher import build_teacher
from raydfkd.runner.pace import peak_mib
from raydfkd.runner.trials import Batch, Part, noise_batches, parts_of, request_for, synthesizer_of, trainer_of
from raydfkd.synthesis.judge import ObjectiveNotFiniteError

HEADROOM = 0.1
"""Share of a device's memory that allocators, and on a GPU its context, have for themselves."""
HELD = 0.4
"""What a process on a CPU holds beside its tensors, as a share of them: blocks within an operator, and those that were
freed and are kept for reuse (``devices.keep_freed_memory``). Of seven networks and batches it was from 0.3 to 0.7."""
STEPS = 2
"""Steps of a trial: in the second one the optimiser's state is there."""
FEW = 2
"""Classes, and images of each, of the smallest trial; the others have twice as many of either."""
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Memory of a worker at its peak, in bytes."""

    fixed: int
    """Whatever the number of images: weights, generators, and the state of their optimiser."""
    per_image: int
    """For each image at once: its pixels, the optimiser's state, and what is kept for the backward pass."""
    images: int
    """Images at once."""
    key: str
    """The key of the recipe that says how many those are."""
    images_of_one: int
    """Images at once for each 1 of that key."""
    process: int
    """Of a process that does nothing: Python, its libraries, and the teacher as it was read."""

    @property
    def tensors(self) -> int:
        """Of all tensors on the device."""
        return self.fixed + self.per_image * self.images

    @property
    def on_host(self) -> int:
        """Of a process whose device is the CPU."""
        return self.process + round((1 + HELD) * self.tensors)

    def most_images(self, available: float) -> int:
        """Images at once for which so many bytes of tensors are enough; 0 where they are for none."""
        return max(0, int((available - self.fixed) / max(1, self.per_image)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Memories:
    """Memory of both kinds of worker."""

    synthesis: Memory
    student: Memory


def memory_of(recipe: Recipe) -> Memories:
    """Make trial steps of a recipe on this machine's CPU, whatever its device; weights need not be there.

    A peak is linear in the classes and in the images of each, so that of the recipe's batches follows from that of
    small ones. Left out are the student's shuffle buffer and images that wait to be stored.

    Raises:
        RecipeError: the recipe is wrong.
    """
    teacher = build_teacher(recipe)
    parts = [_of_part(part, teacher) for part in parts_of(recipe)]
    student = _of_student(recipe, teacher)
    largest = max(parts, key=lambda found: found.memory.tensors)
    beside = sum(found.resident for found in parts) - largest.resident  # all are built, and work in turn
    process = max(0, (peak_mib(CPU) << 20) - max(found.most for found in (*parts, student)))
    return Memories(
        synthesis=replace(largest.memory, fixed=largest.memory.fixed + beside, process=process),
        student=replace(student.memory, process=process),
    )


class _Live(TorchDispatchMode):
    """Adds up the bytes of tensors that are alive, by the storage that they share.

    Args:
        elsewhere: holds tensors that do not count.
    """

    def __init__(self, elsewhere: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as is much of torch
        tensors = (*elsewhere.parameters(), *elsewhere.buffers())
        self._known = {tensor.untyped_storage()._cdata for tensor in tensors}
        self.bytes = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        self.peak = max(self.peak, self.bytes)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place not in self._known:
            self._known.add(place)
            self.bytes += size
            weakref.finalize(storage, self._forget, place, size)

    def _forget(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.bytes -= size


@dataclass(frozen=True, slots=True, kw_only=True)
class _Peak:
    """What a trial took."""

    resident: int
    """Before its first step."""
    at_work: int
    """At most in its steps."""
    most: int
    """At most, its preparations included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What trials of a worker have shown."""

    memory: Memory
    resident: int
    most: int


def _of_part(part: Part, teacher: nn.Module) -> _Found:
    def trial(batch: Batch) -> _Peak:
        recipe = part.trial(batch, steps=STEPS, **_largest_stage(part), compile=False).recipe
        request = request_for(recipe, batch)

        def prepare() -> Callable[[], None]:
            synthesizer = synthesizer_of(recipe, teacher, CPU)

            def work() -> None:
                with contextlib.suppress(ObjectiveNotFiniteError):  # untrained weights; steps were made by then
                    for _ in synthesizer.produce(request, lambda _: None):
                        pass

            return work

        return _peak_of(prepare, teacher)

    batch = part.batch
    if not part.trains_generators:  # whose images do not have classes to themselves
        batch = Batch(classes=1, images_per_class=batch.images)
    with cpu_threads(part.recipe.synthesis.threads):
        return _extrapolated(trial, batch, key=part.key, images_of_one=part.images_of_one)


def _largest_stage(part: Part) -> dict[str, Any]:
    """Options with which pixels are optimised in the largest resolution alone."""
    space, stages = part.recipe.teacher.image_space, part.stages
    edges = [math.prod(stage.edges((space.height, space.width))) for stage in stages]
    return {"stages": [part.options["stages"][edges.index(max(edges))]]} if stages else {}


def _of_student(recipe: Recipe, teacher: nn.Module) -> _Found:
    distill, workers = recipe.distill, recipe.runtime.student_workers.min
    images = -(-distill.batch_size // (distill.accumulate * workers))

    def trial(batch: Batch) -> _Peak:
        spec = distill.model_copy(update={"batch_size": batch.images, "accumulate": 1})
        small = recipe.model_copy(update={"distill": spec})

        def prepare() -> Callable[[], None]:
            trainer, batches = trainer_of(small, teacher, CPU), noise_batches(small, batch.images)
            return lambda: trainer.fit(batches, steps=STEPS)

        return _peak_of(prepare, teacher)

    with cpu_threads(distill.threads):
        batch = Batch(classes=1, images_per_class=max(FEW, images))
        return _extrapolated(trial, batch, key="distill.batch_size", images_of_one=1)


def _peak_of(prepare: Callable[[], Callable[[], None]], teacher: nn.Module) -> _Peak:
    with _Live(teacher) as live:
        work = prepare()
        resident, preparing = live.bytes, live.peak
        live.peak = resident
        work()
    return _Peak(resident=resident, at_work=live.peak, most=max(preparing, live.peak))


def _extrapolated(trial: Callable[[Batch], _Peak], batch: Batch, *, key: str, images_of_one: int) -> _Found:
    """The peak of ``batch`` from those of smaller ones; it is linear in classes, and in images."""
    few = batch.at_most(FEW, FEW)
    first = trial(few)
    more_images = trial(replace(few, images_per_class=2 * few.images_per_class))
    peaks = [first, more_images]
    per_image = (more_images.at_work - first.at_work) / few.images
    per_class = 0.0
    if batch.classes >= 2 * few.classes:
        more_classes = trial(replace(few, classes=2 * few.classes))
        peaks.append(more_classes)
        per_class = (more_classes.at_work - first.at_work) / few.classes - few.images_per_class * per_image
    fixed = first.at_work - per_class * few.classes - per_image * few.images
    memory = Memory(
        fixed=round(fixed + per_class * batch.classes),
        per_image=round(per_image),
        images=batch.images,
        key=key,
        images_of_one=images_of_one,
        process=0,
    )
    return _Found(memory=memory, resident=first.resident, most=max(peak.most for peak in peaks))
