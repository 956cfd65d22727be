"""What is to be made, in which pieces, and which piece comes next. Pure Python: no clock, no torch, no Ray."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else (no device, no worker, no time)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a synthesizer is asked for: ``images_per_class`` images of each class, from these seeds.

    ``class_seeds`` belong to the classes, ``seed`` is common to all packs of a repeat: what a class draws from either
    does not depend on who shares its pack.
    """

    classes: tuple[int, ...]
    images_per_class: int
    seed: int
    class_seeds: tuple[int, ...]

    @property
    def count(self) -> int:
        """Images in total."""
        return len(self.classes) * self.images_per_class


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkUnit:
    """A piece of the plan: a value, the same wherever and however often it is worked on."""

    id: str
    request: Request


def plan_units(
    *, seed: int, classes: Sequence[int], images_per_class: int, classes_per_unit: int, images_per_class_per_unit: int
) -> tuple[WorkUnit, ...]:
    """Split the transfer set into units: packs of classes, repeated until every class has its images.

    Repeats (``r000``, ``r001``, ...) come in the outer loop, so that early units already cover all classes and a
    student can start on them and a longer plan begins with the units of a shorter one.
    """
    assert images_per_class % images_per_class_per_unit == 0, "a unit's content must follow from its id alone"
    units = []
    for repeat in range(images_per_class // images_per_class_per_unit):
        for first in range(0, len(classes), classes_per_unit):
            pack = tuple(classes[first : first + classes_per_unit])
            unit_id = f"r{repeat:03d}-{_pack_name(pack)}"
            request = Request(
                classes=pack,
                images_per_class=images_per_class_per_unit,
                seed=derive_seed(seed, "repeat", repeat),
                class_seeds=tuple(derive_seed(seed, "class", label, repeat) for label in pack),
            )
            units.append(WorkUnit(id=unit_id, request=request))
    return tuple(units)


def _pack_name(pack: tuple[int, ...]) -> str:
    """Names the classes of a pack: as a range where they are one, else by first, last and a digest of them all."""
    name = f"c{pack[0]:04d}-{pack[-1]:04d}"
    if pack == tuple(range(pack[0], pack[-1] + 1)):
        return name
    return f"{name}-{derive_seed(*pack):016x}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why an attempt at a unit came to nothing."""

    unit: str
    attempt: int
    error: str


class UnitQueue:
    """Decides which unit is worked on next.

    A unit lost with its machine goes back to the front and costs nothing; one that fails by itself goes to the back
    and is quarantined at the ``max_attempts``-th failure. Finishing is idempotent: a second attempt's result, or one
    that arrives after quarantine, is welcome and changes nothing twice.
    """

    def __init__(self, units: Sequence[WorkUnit], *, done: Iterable[str] = (), max_attempts: int = 3) -> None:
        self._units = {unit.id: unit for unit in units}
        self._done = set(done) & self._units.keys()
        self._pending = deque(unit.id for unit in units if unit.id not in self._done)
        self._running: set[str] = set()
        self._failures: dict[str, list[Failure]] = {}
        self._quarantined: set[str] = set()
        self._max_attempts = max_attempts
        self.attempted = 0

    def take(self) -> WorkUnit | None:
        """The next unit to work on, or None while there is none to give."""
        while self._pending:
            unit_id = self._pending.popleft()
            if unit_id in self._done:
                continue  # finished by another attempt while it waited
            self._running.add(unit_id)
            self.attempted += 1
            return self._units[unit_id]
        return None

    def finished(self, unit: WorkUnit) -> None:
        """The unit is committed."""
        self._running.discard(unit.id)
        self._quarantined.discard(unit.id)
        self._done.add(unit.id)

    def failed(self, unit: WorkUnit, error: str) -> Failure:
        """The unit's own fault: counts as an attempt."""
        past = self._failures.setdefault(unit.id, [])
        failure = Failure(unit=unit.id, attempt=len(past) + 1, error=error)
        past.append(failure)
        if unit.id in self._running:
            self._running.discard(unit.id)
            if len(past) >= self._max_attempts:
                self._quarantined.add(unit.id)
            else:
                self._pending.append(unit.id)
        return failure

    def lost(self, unit: WorkUnit) -> None:
        """The machine's fault: requeued, not counted."""
        if unit.id in self._running:
            self._running.discard(unit.id)
            self._pending.appendleft(unit.id)

    def attempt_of(self, unit: WorkUnit) -> int:
        """Number of the attempt now under way, from 1."""
        return len(self._failures.get(unit.id, ())) + 1

    @property
    def is_drained(self) -> bool:
        """Whether nothing is pending or running."""
        return not self._running and all(unit_id in self._done for unit_id in self._pending)

    @property
    def num_done(self) -> int:
        """Units committed, those of earlier runs included."""
        return len(self._done)

    @property
    def num_running(self) -> int:
        """Units taken and not yet finished, failed or lost."""
        return len(self._running)

    @property
    def quarantined(self) -> tuple[Failure, ...]:
        """The last failure of every unit that was set aside."""
        return tuple(self._failures[unit_id][-1] for unit_id in sorted(self._quarantined))
