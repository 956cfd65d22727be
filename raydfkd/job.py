"""A recipe made concrete: teacher, plan and transfer set; and who can work on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from raydfkd.data.commits import Snapshot
from raydfkd.data.encodings import Encoding
from raydfkd.data.transfer_set import TransferSet
from raydfkd.networks import build_network
from raydfkd.progress import Monitor
from raydfkd.recipe import Recipe
from raydfkd.schedule import Failure, UnitQueue, WorkUnit, derive_seed
from raydfkd.synthesis.worker import load_teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A recipe that was found sound, with what follows from it and its teacher's weights."""

    recipe: Recipe
    digest: str
    units: tuple[WorkUnit, ...]
    transfer_set: TransferSet

    @property
    def unit_ids(self) -> frozenset[str]:
        """Names of the planned units."""
        return frozenset(unit.id for unit in self.units)

    @property
    def planned_images(self) -> int:
        """Images of the whole plan."""
        return sum(unit.request.count for unit in self.units)

    @property
    def student_digest(self) -> str:
        """Names a training: another student, criterion or plan starts anew instead of resuming."""
        recipe = self.recipe
        payload = {
            "transfer_set": self.digest,
            "images": self.planned_images,
            "encoding": recipe.transfer_set.encoding.model_dump(mode="json"),
            "student": recipe.student.model_dump(mode="json"),
            "distill": recipe.distill.model_dump(mode="json"),
        }
        return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()

    def snapshot(self) -> Snapshot:
        """What is committed of the plan."""
        return self.transfer_set.snapshot(within=self.unit_ids)

    def begin_synthesis(self) -> UnitQueue:
        """Start the set or go on with it; returns the units that are left to make."""
        self.transfer_set.create()
        self.transfer_set.reopen()
        done = self.transfer_set.committed()
        runtime = self.recipe.runtime
        return UnitQueue(self.units, done=done, max_attempts=runtime.max_attempts, max_losses=runtime.max_losses)

    def end_synthesis(self, queue: UnitQueue) -> SynthesisOutcome:
        """Say in the set that no more units will come."""
        self.transfer_set.close([failure.unit for failure in queue.quarantined])
        return SynthesisOutcome(attempted=queue.attempted, quarantined=queue.quarantined)

    def fresh_student(self) -> nn.Module:
        """The student before training."""
        seed = derive_seed(self.recipe.seed, "student")
        return build_network(self.recipe.student, self.recipe.teacher, where="student", seed=seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthesisOutcome:
    """How synthesis ended."""

    attempted: int
    quarantined: tuple[Failure, ...]


class Executor(Protocol):
    """Where the work happens: this process or a Ray cluster."""

    def synthesize(self, job: Job, monitor: Monitor) -> SynthesisOutcome:
        """Work until every unit is committed or set aside; the set is closed then."""

    def distill(self, job: Job, monitor: Monitor) -> Mapping[str, Tensor]:
        """Train the student on a set that is complete or growing; returns its state dict."""

    def run(self, job: Job, monitor: Monitor) -> tuple[SynthesisOutcome, Mapping[str, Tensor]]:
        """Both, at once where that is possible."""


def open_job(recipe: Recipe) -> Job:
    """Fix the plan and the set that it fills; the teacher's weights must be there."""
    _, weights = load_teacher(recipe)
    return job_of(recipe, recipe.digest(weights))


def job_of(recipe: Recipe, digest: str) -> Job:
    """The job of a digest that somebody else has taken; the weights are not looked at."""
    return Job(recipe=recipe, digest=digest, units=recipe.plan(), transfer_set=transfer_set_of(recipe, digest))


def transfer_set_of(recipe: Recipe, digest: str) -> TransferSet:
    """The set that the recipe fills; nothing is written or read."""
    spec = recipe.transfer_set
    return TransferSet(
        spec.uri,
        digest=digest,
        storage_options=spec.storage_options,
        part_rows=spec.part_rows,
        encoding=Encoding(kind=spec.encoding.kind, quality=spec.encoding.quality),
    )
