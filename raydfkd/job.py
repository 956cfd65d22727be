"""A recipe made concrete: its digest, its phases and the transfer set that it fills."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from raydfkd.config.recipe import Recipe
from raydfkd.data.commit_log import Progress
from raydfkd.data.commits import Snapshot
from raydfkd.data.encodings import Encoding
from raydfkd.data.news import Watch
from raydfkd.data.student_versions import StudentPublisher
from raydfkd.data.transfer_set import TransferSet
from raydfkd.images.picture_folder import pictures_of
from raydfkd.losses.objective import needs_of
from raydfkd.networks.embeddings import digest_of_embeddings
from raydfkd.networks.observed import Need
from raydfkd.networks.teacher import Teacher, open_teacher
from raydfkd.units import Failure, Phase, UnitQueue, WorkUnit

NEWS_REST = 20
"""A set is not listed for news again for so many times what it took: the driver knows its own workers' commits."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe that was found sound, with what follows from it and its teacher's weights."""

    recipe: Recipe
    made_of: Mapping[str, object]
    """Everything that its images depend on, as plain data."""
    phases: tuple[Phase, ...]
    transfer_set: TransferSet

    @property
    def digest(self) -> str:
        """Names the images: SHA-256 of all that they depend on."""
        return self.transfer_set.digest

    @property
    def units(self) -> tuple[WorkUnit, ...]:
        """Every unit of the plan, in order; none where the student's source is live."""
        return self.phases[-1].units

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

    @cached_property
    def held_out(self) -> frozenset[str]:
        """Units that the student never trains on, so that it can be judged on them: the last repeats, whole ones.

        None where real images judge, and none of a single repeat, which would take classes away.
        """
        recipe = self.recipe
        if recipe.real_data is not None or recipe.repeats < 2 or not recipe.distill.holdout:
            return frozenset()
        count = min(recipe.repeats - 1, max(1, round(recipe.distill.holdout * recipe.repeats)))
        return frozenset(unit.id for unit in self.units if unit.repeat >= recipe.repeats - count)

    def trained_units(self, phase: Phase) -> list[WorkUnit]:
        """The units that the student is trained on until the end of ``phase``."""
        return [unit for unit in phase.units if unit.id not in self.held_out]

    @cached_property
    def trained_by(self) -> Mapping[str, object]:
        """Everything that the student's training depends on, as plain data."""
        return {"transfer_set": self.digest, "held_out": sorted(self.held_out), **self.recipe.trained_by()}

    @cached_property
    def student_digest(self) -> str:
        """Names a training: another student, criterion or plan begins again instead of resuming; same in each phase."""
        return _sha256(self.trained_by)

    @property
    def training_name(self) -> str:
        """Names the training in the metrics."""
        return self.student_digest[:8]

    def snapshot(self) -> Snapshot:
        """The commits of the planned units; all commits of the set where the source is live."""
        return self.transfer_set.snapshot(within=self.unit_ids if self.units else None)

    @property
    def is_closed(self) -> bool:
        """Whether synthesis of the whole plan has ended."""
        return self.transfer_set.is_closed(self.phases[-1].plan)

    def begin_synthesis(self, phase: Phase | None = None) -> UnitQueue:
        """Start the set or continue it; returns the units of ``phase``, or of all, that are left to make."""
        self.transfer_set.create()
        units = self.units if phase is None else phase.units
        done = self.snapshot().units  # whose records were read: one that is damaged is not done
        runtime = self.recipe.runtime
        queue = UnitQueue(units, done=done, max_attempts=runtime.max_attempts, max_losses=runtime.max_losses)
        if not queue.is_drained:
            self.transfer_set.reopen(queue.plan)
        return queue

    def news(self, *, at_once: bool = False) -> Progress | None:
        """Units that are committed and those whose commit was taken out, whoever it was; None where nothing is new.

        Takes a small request where nothing is new, and seconds to list a large set elsewhere; may be called on any
        thread, one at a time. A listing is as old as its beginning: a unit that it calls damaged may have been
        committed again meanwhile.

        Args:
            at_once: whether to list in any case, as before nothing is left to do.

        Raises:
            StoreError: the store failed; the next call looks again.
        """
        self.transfer_set.pack()
        return self._watch.news(at_once=at_once)

    def catch_up(self, queue: UnitQueue, news: Progress) -> None:
        """Tell the queue of units that others have committed, and of commits that were found damaged and taken out."""
        queue.finished_elsewhere(news.committed)
        for unit_id in news.damaged & self.unit_ids:
            queue.reopened(self.units_by_id[unit_id])

    @cached_property
    def _watch(self) -> Watch[Progress]:
        return Watch(self.transfer_set.store, self.transfer_set.progress, rest=NEWS_REST)

    def end_synthesis(self, queue: UnitQueue) -> SynthesisOutcome:
        """Say in the set that no more units of the queue's plan will come; plans that share the set are let be."""
        self.transfer_set.close(queue.plan, [failure.unit for failure in queue.given_up])
        return SynthesisOutcome(attempted=queue.attempted, given_up=queue.given_up)

    def publisher(self) -> Callable[[int, Mapping[str, Tensor]], None] | None:
        """Takes versions of the student to the set, where synthesis asks it; with several phases the last of each."""
        if not asks_student(self.recipe) or not self.units:
            return None
        publisher = StudentPublisher(self.transfer_set.store, keep=max(3, len(self.phases)))
        if len(self.phases) == 1:
            return publisher.publish
        ends = {phase.until_step for phase in self.phases}
        return lambda version, state: publisher.publish(version, state) if version in ends else None


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthesisOutcome:
    """The end of a synthesis: attempts at units, and units that were given up."""

    attempted: int
    given_up: tuple[Failure, ...]


def open_job(recipe: Recipe, teacher: Teacher | None = None) -> Job:
    """Fix the plan and the set that it fills; the teacher is opened unless it is given."""
    return job_of(recipe, dependencies_of(recipe, teacher or open_teacher(recipe)))


def dependencies_of(recipe: Recipe, teacher: Teacher) -> Mapping[str, object]:
    """Everything that the recipe's images depend on, with the ``teacher``'s weights, as plain data.

    Raises:
        RecipeError: real pictures that it names are not there or not enough.
    """
    pictures = {key: folder.sha256 for key, folder in pictures_of(recipe).items()}
    embeddings = digest_of_embeddings(recipe)
    if embeddings is not None:
        pictures["synthesis.embeddings"] = embeddings
    return recipe.made_of(teacher.sha256, is_against_student=asks_student(recipe), pictures=pictures)


def job_of(recipe: Recipe, made_of: Mapping[str, object]) -> Job:
    """The job of a recipe whose ``made_of`` somebody else has taken; the weights are not looked at."""
    return Job(recipe=recipe, made_of=made_of, phases=recipe.phases(), transfer_set=transfer_set_of(recipe, made_of))


def transfer_set_of(recipe: Recipe, made_of: Mapping[str, object]) -> TransferSet:
    """The set that the recipe fills; nothing is written or read."""
    spec = recipe.transfer_set
    return TransferSet(
        spec.uri,
        digest=_sha256(made_of),
        made_of=made_of,
        storage_options=spec.storage_options,
        part_rows=spec.part_rows,
        encoding=Encoding(kind=spec.encoding.kind, quality=spec.encoding.quality, top_k=spec.logits.top_k),
    )


def asks_student(recipe: Recipe) -> bool:
    """Whether a term of the recipe's objective asks the student."""
    return Need.STUDENT in needs_of(recipe.synthesis.objective)


def _sha256(data: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
