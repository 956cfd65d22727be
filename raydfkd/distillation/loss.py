"""The student's loss: one criterion, or a weighted sum of several that take turns over the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raydfkd.config.schema import CriterionSpec, DistillSpec, Ramp
from raydfkd.distillation.criteria import CRITERIA, Criterion
from raydfkd.errors import RecipeError
from raydfkd.networks.observed import Observation, ObservedNetwork, Tap
from raydfkd.networks.taps import wrapped
from raydfkd.seeds import derive_seed, rng_from, seeded


@dataclass(frozen=True, slots=True, kw_only=True)
class LossValue:
    """Value of a student's loss: ``total`` to differentiate, ``parts`` (unweighted, detached) for the log."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    name: str
    where: str
    """Recipe key."""
    criterion: Criterion
    spec: CriterionSpec | None
    """Weight and steps of one in a list; None of the only one."""

    def counts_at(self, progress: float) -> bool:
        return self.spec is None or self.spec.counts_at(progress)

    def weighted(self, value: Tensor, progress: float) -> Tensor:
        if self.spec is None:
            return value
        weight = self.spec.weight
        return value * (weight.at(progress) if isinstance(weight, Ramp) else weight)


class StudentLoss:
    """The loss that ``distill.criterion`` says, with the connectors that are trained along.

    Args:
        spec: the section of the recipe.

    Raises:
        RecipeError: unknown criterion or option, or one that reads layers of the teacher where its logits are stored.
    """

    def __init__(self, spec: DistillSpec) -> None:
        self._parts = list(_parts_of(spec))
        self.connectors = nn.ModuleDict()
        """Layers between those that are compared, by the criterion's number; ``connect`` makes them."""
        if spec.teacher_logits == "stored":
            for part in self._parts:
                if _taps(part.criterion, "teacher_taps"):
                    raise RecipeError(
                        f'{part.where} reads a layer of the teacher, but distill.teacher_logits is "stored"; use '
                        '"live", which asks the teacher, or another criterion'
                    )

    @property
    def student_taps(self) -> dict[Tap, str]:
        """Reads of the student, with the recipe key of the criterion that has each, as messages name it."""
        return {tap: part.where for part in self._parts for tap in _taps(part.criterion, "student_taps")}

    @property
    def teacher_taps(self) -> dict[Tap, str]:
        """The same of the teacher."""
        return {tap: part.where for part in self._parts for tap in _taps(part.criterion, "teacher_taps")}

    def label_reader(self, *, takes_mixed: bool) -> str | None:
        """The criterion that reads labels, if there is one: one that takes those of mixed images, or does not."""
        for part in self._parts:
            reads = getattr(part.criterion, "needs_labels", False)
            if reads and getattr(part.criterion, "takes_mixed_labels", False) == takes_mixed:
                return f"the criterion {part.name}"
        return None

    def connect(
        self,
        student: Observation,
        teacher: Observation,
        *,
        seed: int,
        parallel: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        """Make the connectors that the criteria want, for what was observed of a few images.

        Args:
            student: observation of the student.
            teacher: of the teacher, of the same images.
            seed: of the connectors' weights.
            parallel: wraps each for data parallelism; only those that take part in a step wait for each other.

        Raises:
            RecipeError: two layers that cannot be compared.
        """
        for number, part in enumerate(self._parts):
            if not isinstance(part.criterion, Criterion):
                continue
            try:
                with seeded(derive_seed(seed, "connector", number)):
                    fresh = part.criterion.connector(student, teacher)
            except ValueError as error:
                raise RecipeError(f"{part.where}: {error}") from None
            if fresh is not None:
                connector = parallel(fresh.to(student.logits.device))
                self.connectors[str(number)] = connector
                part.criterion.attach(connector)

    def state_dict(self) -> dict[str, Any]:
        """Weights and statistics of the connectors, whatever wraps them."""
        return {number: wrapped(connector).state_dict() for number, connector in self.connectors.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from ``state``."""
        for number, connector in self.connectors.items():
            wrapped(connector).load_state_dict(state[number])

    def __call__(self, student: Observation, teacher: Observation, labels: Tensor, *, progress: float) -> LossValue:
        """Compare two observations of N images, ``progress`` being the share of the steps that are made.

        ``labels`` are numbers [N], or shares of the classes [N, K] of mixed images.
        """
        values = [(part, part.criterion(student, teacher, labels)) for part in self._parts if part.counts_at(progress)]
        weighted = [part.weighted(value, progress) for part, value in values]
        if all(_taps(part.criterion, "student_taps") for part, _ in values):
            # Layers behind those that are compared get a gradient of zero: data parallelism waits for one of each.
            weighted.append(0 * student.logits.sum())
        return LossValue(
            total=weighted[0] if len(weighted) == 1 else torch.stack(weighted).sum(),
            parts={part.name: value.detach() for part, value in values if part.spec is not None},
        )


def _parts_of(spec: DistillSpec) -> Iterator[_Part]:
    where = "distill.criterion"
    if not isinstance(spec.criterion, tuple):
        criterion = CRITERIA.build(spec.criterion.kind, spec.criterion.options, where=where)
        yield _Part(name=spec.criterion.kind, where=where, criterion=criterion, spec=None)
        return
    for index, one in enumerate(spec.criterion):
        key = f"{where}[{index}]"
        yield _Part(name=one.name, where=key, criterion=CRITERIA.build(one.kind, one.options, where=key), spec=one)


def _taps(criterion: Criterion, of: str) -> frozenset[Tap]:
    taps: frozenset[Tap] = getattr(criterion, of, frozenset())  # a criterion of the user's may be any callable
    return taps


def connect(
    loss: StudentLoss,
    student: ObservedNetwork,
    teacher: ObservedNetwork,
    image_shape: tuple[int, int, int],
    *,
    device: torch.device,
    seed: int,
    parallel: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> None:
    """Make the connectors of a loss by a look at two random images, with both networks in eval mode."""
    images = torch.randn(2, *image_shape, generator=rng_from(0)).to(device)
    with torch.no_grad():
        loss.connect(student(images), teacher(images), seed=seed, parallel=parallel)


def check_layers(spec: DistillSpec, student: nn.Module, teacher: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Find mistakes in the layers that the criteria of a recipe name; leaves both networks as they are.

    Raises:
        RecipeError: a network has no such layer, or two of them cannot be compared.
    """
    loss = StudentLoss(spec)
    if not loss.student_taps and not loss.teacher_taps:
        return
    asked = ((student, loss.student_taps, "student"), (teacher, loss.teacher_taps, "teacher"))
    ours, theirs = (
        ObservedNetwork(network, taps=taps, frozen=True, image_shape=image_shape, name=name)
        for network, taps, name in asked
    )
    connect(loss, ours, theirs, image_shape, device=torch.device("cpu"), seed=0)
