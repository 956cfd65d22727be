"""Units of work: the plan of a set in pieces, and the queue of them. Pure Python: no clock, no torch, no Ray."""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, overload

from raydfkd.report.redaction import redacted
from raydfkd.seeds import derive_seed

MAX_ALIKE = 5
"""Units in a row that fail alike, none done between them, after which it is nothing about the units."""
_OF_AN_ATTEMPT = re.compile(r"[0-9a-f]{8,}|[0-9]+")
"""The parts of an error that differ from attempt to attempt: numbers and random names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassSeeds(Sequence[int]):
    """The seeds of some classes in one repeat, derived when they are read.

    A plan of a million units need not hold its seeds (48 bytes each), nor its maker derive them (1 us each): the
    worker does.
    """

    seed: int
    classes: tuple[int, ...]
    repeat: int

    def __len__(self) -> int:
        return len(self.classes)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, slice):
            return ClassSeeds(seed=self.seed, classes=self.classes[index], repeat=self.repeat)
        return derive_seed(self.seed, "class", self.classes[index], self.repeat)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The request to a synthesizer: ``images_per_class`` images of each class, from these seeds.

    ``class_seeds`` belong to the classes, ``seed`` is common to all packs of a repeat: what a class draws from either
    does not depend on who shares its pack.
    """

    classes: tuple[int, ...]
    images_per_class: int
    seed: int
    class_seeds: Sequence[int]

    @property
    def count(self) -> int:
        """Images in total."""
        return len(self.classes) * self.images_per_class


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkUnit:
    """A piece of the plan: a value, the same wherever and however often it is worked on."""

    id: str
    request: Request
    repeat: int = 0
    """Number of the repeat over all classes that it belongs to, from 0."""


def plan_units(
    *, seed: int, classes: Sequence[int], images_per_class: int, classes_per_unit: int, images_per_class_per_unit: int
) -> tuple[WorkUnit, ...]:
    """Split the transfer set into units: packs of classes, repeated until every class has its images.

    Repeats (``r000``, ``r001``, ...) come in the outer loop, so that early units already cover all classes and a
    student can start on them and a longer plan begins with the units of a shorter one. A unit takes about 260 bytes
    and 3 us of CPU, however many classes are in its pack.
    """
    assert images_per_class % images_per_class_per_unit == 0, "a unit's content must follow from its id alone"
    packs = [tuple(classes[first : first + classes_per_unit]) for first in range(0, len(classes), classes_per_unit)]
    named_packs = [(_pack_name(pack), pack) for pack in packs]
    units = []
    for repeat in range(images_per_class // images_per_class_per_unit):
        repeat_seed = derive_seed(seed, "repeat", repeat)
        for name, pack in named_packs:
            request = Request(
                classes=pack,
                images_per_class=images_per_class_per_unit,
                seed=repeat_seed,
                class_seeds=ClassSeeds(seed=seed, classes=pack, repeat=repeat),
            )
            units.append(WorkUnit(id=f"r{repeat:03d}-{name}", request=request, repeat=repeat))
    return tuple(units)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of synthesis with the training on what it made; a job is one phase or several, one after the other."""

    units: tuple[WorkUnit, ...]
    """Units that are there once the phase ends, those of earlier phases included; none for live sources."""
    until_step: int
    """Steps that the student has made once the phase ends."""
    student_version: int | Literal["newest"] | None = "newest"
    """Student that the phase's own images are made against, where a term asks one; None while there is none."""

    @property
    def plan(self) -> str:
        """Names the plan of its units; see ``plan_name``."""
        return plan_name(unit.id for unit in self.units)


def plan_name(ids: Iterable[str]) -> str:
    """The name of the plan of these units, in any order: 16 hexadecimal digits; plans of one set have others."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:16]


def plan_phases(units: tuple[WorkUnit, ...], *, repeats: int, rounds: int, steps: int) -> tuple[Phase, ...]:
    """Share ``repeats`` and ``steps`` out among ``rounds``: each makes whole repeats, so that it covers all classes.

    From the second round on images are made against the student of the round before. A single round follows the
    newest student instead, since synthesis and training may then run at once.
    """
    if rounds == 1:
        return (Phase(units=units, until_step=steps),)
    return tuple(
        Phase(
            units=tuple(unit for unit in units if unit.repeat * rounds // repeats <= number),
            until_step=steps * (number + 1) // rounds,
            student_version=steps * number // rounds if number else None,
        )
        for number in range(rounds)
    )


def _pack_name(pack: tuple[int, ...]) -> str:
    """Names the classes of a pack: as a range where they are one, else by first, last and a digest of them all."""
    name = f"c{pack[0]:04d}-{pack[-1]:04d}"
    if pack == tuple(range(pack[0], pack[-1] + 1)):
        return name
    return f"{name}-{derive_seed(*pack):016x}"


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitProgress:
    """The progress of an attempt at a unit; also the sign that its worker is alive."""

    unit: str
    step: int
    """Steps that were made of the unit."""
    steps: int
    """Steps that it takes; 0 where that is not known."""
    objective: Mapping[str, float] = field(default_factory=dict)
    """Parts of the objective and the ``step`` of the optimisation they belong to, where they were just looked at."""

    @property
    def share(self) -> float:
        """Share of the unit that is made; 0 where the number of steps is not known."""
        return min(1.0, self.step / self.steps) if self.steps else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The failure of an attempt at a unit, with its reason."""

    unit: str
    attempt: int
    error: str


class UnitQueue:
    """Decides which unit is worked on next: each one waits, runs, is done or is given up.

    An attempt can end in four ways:

    * It is committed: the unit is done, unless the commit is later found damaged.
    * It fails by itself: the unit goes to the back and is given up at its ``max_attempts``-th failure.
    * Its machine is preempted or drained: nobody's fault; the unit goes to the front and nothing is counted.
    * Its worker dies without a reason that is known: no attempt is counted, for it may have been the machine, but a
      unit that crashes the process or eats its memory would come back for ever; so the unit is given up at the
      ``max_losses``-th death in a row without getting further than before the one before it, preemptions between
      them not regarded. It goes to the back, so that a machine that kills whatever it is given does not get the same
      unit until that is blamed. Where a share p of attempts dies unannounced and saves nothing, p ** max_losses of the
      units are given up without fault: 1 in 100,000 for 10 % and 5.

    A store that is full, or an objective that is NaN everywhere, fails every unit alike: then ``lasting_failure`` says
    so, instead of all units being tried in vain, each ``max_attempts`` times.

    The queue knows units, not attempts. News of an attempt that is over already, or of a second one, is taken as news
    of its unit: a result is always welcome, also after that, and changes nothing twice; a failure counts unless
    the unit is done or given up; a loss does not, unless the unit runs. All but ``given_up`` is O(1).
    """

    def __init__(
        self, units: Sequence[WorkUnit], *, done: Iterable[str] = (), max_attempts: int = 3, max_losses: int = 5
    ) -> None:
        self._ids = {unit.id for unit in units}
        assert len(self._ids) == len(units), "units are told apart by their ids"
        self._done = self._ids.intersection(done)
        self._pending = OrderedDict((unit.id, unit) for unit in units if unit.id not in self._done)
        self._running: set[str] = set()
        self._failures: dict[str, int] = {}
        self._losses: dict[str, int] = {}
        self._reached: dict[str, int] = {}
        self._kind, self._alike = "", dict[str, str]()
        self._given_up: dict[str, Failure] = {}
        self._max_attempts = max_attempts
        self._max_losses = max_losses
        self.attempted = 0

    def take(self) -> WorkUnit | None:
        """The next unit to work on, or None while there is none to give."""
        if not self._pending:
            return None
        _, unit = self._pending.popitem(last=False)
        self._running.add(unit.id)
        self.attempted += 1
        return unit

    def progressed(self, unit_id: str, step: int) -> None:
        """A running unit has come to ``step``; further than ever, it does not get stuck where its workers died."""
        if unit_id in self._running and step > self._reached.get(unit_id, 0):
            self._reached[unit_id] = step
            if unit_id in self._losses:
                self._losses[unit_id] = 0

    def finished(self, unit: WorkUnit) -> bool:
        """The unit is committed; returns whether that is news."""
        is_news = unit.id not in self._done
        self._settle(unit.id)
        return is_news

    def finished_elsewhere(self, ids: Iterable[str]) -> None:
        """The units ``ids`` are committed, by whoever it was; ids of other plans are ignored."""
        for unit_id in self._ids.intersection(ids) - self._done:
            self._settle(unit_id)

    def reopened(self, unit: WorkUnit) -> None:
        """The unit's commit is no longer part of the set: it waits again, as one that was never done."""
        if unit.id in self._done:
            self._done.remove(unit.id)
            self._failures.pop(unit.id, None)
            self._losses.pop(unit.id, None)
            self._reached.pop(unit.id, None)
            self._pending[unit.id] = unit

    def failed(self, unit: WorkUnit, error: str) -> Failure:
        """The unit's own fault: counts as an attempt, and shows that its worker survives it."""
        failure = Failure(unit=unit.id, attempt=self.attempt_of(unit), error=redacted(error))
        if self._is_settled(unit):
            return failure
        self._failures[unit.id] = failure.attempt
        self._losses.pop(unit.id, None)
        self._note_kind(unit, error)
        if failure.attempt >= self._max_attempts:
            self._give_up(failure)
        elif unit.id in self._running:
            self._running.remove(unit.id)
            self._pending[unit.id] = unit
        return failure

    def lost(self, unit: WorkUnit, *, preempted: bool = False) -> Failure | None:
        """The worker died under the unit: requeued, no attempt counted.

        ``preempted`` says that its machine is known to have been taken away. Returns why the unit is given up where
        this death was one too many.
        """
        if unit.id not in self._running:
            return None
        self._running.remove(unit.id)
        if preempted:
            self._pending[unit.id] = unit
            self._pending.move_to_end(unit.id, last=False)
            return None
        losses = self._losses[unit.id] = self._losses.get(unit.id, 0) + 1
        if losses < self._max_losses:
            self._pending[unit.id] = unit
            return None
        error = f"killed its worker {losses} times in a row: out of memory, or a crash below Python"
        return self._give_up(Failure(unit=unit.id, attempt=self.attempt_of(unit), error=error))

    def attempt_of(self, unit: WorkUnit) -> int:
        """Number of the attempt now under way, from 1; those that were lost share the number of the next."""
        return self._failures.get(unit.id, 0) + 1

    def is_given_up(self, unit: WorkUnit) -> bool:
        """Whether the unit was given up and no result has arrived since."""
        return unit.id in self._given_up

    @property
    def lasting_failure(self) -> str | None:
        """The failure that the last units had in common, in one line, once it is in vain to try others."""
        if len(self._alike) < MAX_ALIKE:
            return None
        error = next(reversed(self._alike.values()))
        return f"{len(self._alike)} units in a row failed alike and none was done: {error}"

    @property
    def plan(self) -> str:
        """Names the plan of its units, waiting or not; see ``plan_name``."""
        return plan_name(self._ids)

    @property
    def is_drained(self) -> bool:
        """Whether nothing waits or runs."""
        return self.num_open == 0

    @property
    def num_open(self) -> int:
        """Units that wait or run."""
        return len(self._ids) - len(self._done) - len(self._given_up)

    @property
    def num_running(self) -> int:
        """Units taken and not yet finished, failed or lost."""
        return len(self._running)

    @property
    def given_up(self) -> tuple[Failure, ...]:
        """The failure of each unit that was given up, in order of their ids; takes a sort, unlike ``is_given_up``."""
        return tuple(self._given_up[unit_id] for unit_id in sorted(self._given_up))

    def _note_kind(self, unit: WorkUnit, error: str) -> None:
        """Keep the errors of different units for as long as they are of one kind."""
        kind = _OF_AN_ATTEMPT.sub("*", error.replace(unit.id, "*"))
        if kind != self._kind:
            self._kind, self._alike = kind, {}
        self._alike[unit.id] = error

    def _is_settled(self, unit: WorkUnit) -> bool:
        return unit.id in self._done or unit.id in self._given_up

    def _settle(self, unit_id: str) -> None:
        self._withdraw(unit_id)
        self._given_up.pop(unit_id, None)
        self._done.add(unit_id)
        self._alike.clear()

    def _give_up(self, failure: Failure) -> Failure:
        self._withdraw(failure.unit)
        self._given_up[failure.unit] = failure
        return failure

    def _withdraw(self, unit_id: str) -> None:
        self._running.discard(unit_id)
        self._pending.pop(unit_id, None)
