"""A recipe made concrete: teacher, plan and transfer set; and who can work on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor, nn

from raydfkd.config.recipe import Recipe
from raydfkd.data.commits import Snapshot
from raydfkd.data.encodings import Encoding
from raydfkd.data.student_versions import StudentPublisher
from raydfkd.data.transfer_set import TransferSet
from raydfkd.losses.objective import needs_of
from raydfkd.networks.build import build_network
from raydfkd.networks.observed import Need
from raydfkd.networks.weights import load_teacher
from raydfkd.seeds import derive_seed
from raydfkd.units import Failure, UnitQueue, WorkUnit


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe that was found sound, with what follows from it and its teacher's weights."""

    recipe: Recipe
    digest: str
    units: tuple[WorkUnit, ...]
    transfer_set: TransferSet
    until: int | None = None
    """Step at which the student's training stops before its last, for a round that others follow."""

    def rounds(self) -> Iterator[Job]:
        """The job of each round: what is to be there after it, and how far the student is to be trained on that."""
        last = self.recipe.rounds - 1
        for number in range(last):
            units = tuple(unit for unit in self.units if self.recipe.round_of(unit) <= number)
            yield replace(self, units=units, until=self.recipe.steps_until(number))
        yield self

    @cached_property
    def units_by_id(self) -> Mapping[str, WorkUnit]:
        """The planned units by their names."""
        return {unit.id: unit for unit in self.units}

    @property
    def unit_ids(self) -> Set[str]:
        """Names of the planned units."""
        return self.units_by_id.keys()

    @cached_property
    def planned_images(self) -> int:
        """Images of the whole plan."""
        return sum(unit.request.count for unit in self.units)

    @property
    def student_digest(self) -> str:
        """Names a training: another student, criterion or plan starts anew instead of resuming; same in each round."""
        recipe = self.recipe
        payload = {
            "transfer_set": self.digest,
            "images": len(recipe.classes) * recipe.transfer_set.images_per_class,
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
        done = self.snapshot().units  # whose records were read: one that is damaged is not done
        runtime = self.recipe.runtime
        queue = UnitQueue(self.units, done=done, max_attempts=runtime.max_attempts, max_losses=runtime.max_losses)
        if not queue.is_drained:
            self.transfer_set.reopen()
        return queue

    def catch_up(self, queue: UnitQueue) -> None:
        """Tell the queue of units that others have committed, and of commits that were found damaged and taken out."""
        queue.finished_elsewhere(self.transfer_set.committed())
        for unit_id in self.transfer_set.damaged() & self.unit_ids:
            queue.reopened(self.units_by_id[unit_id])

    def end_synthesis(self, queue: UnitQueue) -> SynthesisOutcome:
        """Say in the set that no more units will come."""
        self.transfer_set.close([failure.unit for failure in queue.given_up])
        return SynthesisOutcome(attempted=queue.attempted, given_up=queue.given_up)

    def publisher(self) -> Callable[[int, Mapping[str, Tensor]], None] | None:
        """Takes versions of the student to the set, where synthesis asks it; in rounds the last one of each."""
        if not asks_student(self.recipe):
            return None
        recipe = self.recipe
        publisher = StudentPublisher(self.transfer_set.store, keep=max(3, recipe.rounds))
        if recipe.rounds == 1:
            return publisher.publish
        ends = {recipe.steps_until(number) for number in range(recipe.rounds)}
        return lambda version, state: publisher.publish(version, state) if version in ends else None

    def fresh_student(self) -> nn.Module:
        """The student before training."""
        seed = derive_seed(self.recipe.seed, "student")
        return build_network(self.recipe.student, self.recipe.teacher, where="student", seed=seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthesisOutcome:
    """How synthesis ended."""

    attempted: int
    given_up: tuple[Failure, ...]


def open_job(recipe: Recipe) -> Job:
    """Fix the plan and the set that it fills; the teacher's weights must be there."""
    _, weights = load_teacher(recipe)
    return job_of(recipe, digest_of(recipe, weights))


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


def asks_student(recipe: Recipe) -> bool:
    """Whether a term of the recipe's objective asks the student."""
    return Need.STUDENT in needs_of(recipe.synthesis.objective)


def digest_of(recipe: Recipe, weights_sha256: str) -> str:
    """Digest of all that the recipe's images depend on."""
    return recipe.digest(weights_sha256, is_against_student=asks_student(recipe))
