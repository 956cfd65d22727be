"""A recipe's queue run in simulated time on machines that come and go: what a run would take and waste."""

from __future__ import annotations

import heapq
import math
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Self

from raydfkd.errors import RecipeError, did_you_mean
from raydfkd.seeds import derive_seed
from raydfkd.units import UnitQueue, WorkUnit

RUNS = 50
"""Simulated runs that percentiles are of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Machines of one worker each, as the user expects them."""

    nodes: int = 8
    preempt_per_hour: float = 0.0
    """Times an hour that a machine is taken away; another of its kind starts at once."""
    start_s: float = 120.0
    """Seconds until a machine works."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """The fleet of ``nodes=64,preempt_per_hour=0.1,start_s=180``.

        Raises:
            RecipeError: unknown key, or no such number.
        """
        given: dict[str, float] = {}
        for part in filter(None, text.split(",")):
            key, _, value = part.partition("=")
            if key not in cls.__dataclass_fields__:
                remedy = did_you_mean(key, list(cls.__dataclass_fields__))
                raise RecipeError(f"--simulate has {part!r}, which is none of its keys; {remedy}")
            if not re.fullmatch(r"\d+(\.\d+)?", value):
                raise RecipeError(f"--simulate has {part!r}; give a number, as in {key}=8")
            given[key] = float(value)
        if "nodes" in given:
            if given["nodes"] < 1 or given["nodes"] % 1:
                raise RecipeError(f"--simulate has nodes={given['nodes']:g}; give a whole number from 1")
            given["nodes"] = int(given["nodes"])
        return cls(**given)  # type: ignore[arg-type]  # whole where it has to be


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one simulated run came to."""

    wall_s: float
    machine_s: float
    """Seconds that machines were held, their starts included, until the last unit was done."""
    wasted_s: float
    """Seconds of work that was lost with machines, back to the last checkpoint."""
    preemptions: int


def simulate(units: Sequence[WorkUnit], unit_s: float, checkpoint_s: float, fleet: Fleet, *, seed: int) -> Run:
    """Run the units through the queue that real runs have, machine by machine.

    Args:
        units: of the plan.
        unit_s: seconds of work of each.
        checkpoint_s: seconds of work between checkpoints that another machine can go on from.
        fleet: the machines.
        seed: of when they are taken away.
    """
    return _Simulation(UnitQueue(units), unit_s, checkpoint_s, fleet, random.Random(derive_seed(seed, "fleet"))).run()


class _Simulation:
    """Machines are places of the fleet; one that is taken away is followed by another in its place."""

    def __init__(self, queue: UnitQueue, unit_s: float, checkpoint_s: float, fleet: Fleet, rng: random.Random) -> None:
        self._queue, self._unit_s, self._checkpoint_s, self._fleet, self._rng = queue, unit_s, checkpoint_s, fleet, rng
        self._now = 0.0
        self._events: list[tuple[float, int, int, str]] = []
        self._machine = [0] * fleet.nodes
        """Number of the machine in each place; events of earlier ones count no longer."""
        self._since = [0.0] * fleet.nodes
        self._working: dict[int, tuple[WorkUnit, float]] = {}
        self._idle: list[int] = []
        self._saved: dict[str, float] = {}
        """Seconds of work in the last checkpoint of each unit that lost a machine."""
        self._held = self._wasted = 0.0
        self._preemptions = 0

    def run(self) -> Run:
        """All events until the last unit is done."""
        for place in range(self._fleet.nodes):
            self._start(place)
        while not self._queue.is_drained:
            self._now, place, machine, what = heapq.heappop(self._events)
            if machine == self._machine[place]:
                {"free": self._give, "done": self._done, "gone": self._gone}[what](place)
        held = self._held + sum(self._now - since for since in self._since)
        return Run(wall_s=self._now, machine_s=held, wasted_s=self._wasted, preemptions=self._preemptions)

    def _start(self, place: int) -> None:
        self._machine[place] += 1
        self._since[place] = self._now
        self._later(self._fleet.start_s, place, "free")
        if self._fleet.preempt_per_hour:
            self._later(self._rng.expovariate(self._fleet.preempt_per_hour / 3600), place, "gone")

    def _later(self, seconds: float, place: int, what: str) -> None:
        heapq.heappush(self._events, (self._now + seconds, place, self._machine[place], what))

    def _give(self, place: int) -> None:
        unit = self._queue.take()
        if unit is None:
            self._idle.append(place)
            return
        self._working[place] = (unit, self._now)
        self._later(self._unit_s - self._saved.get(unit.id, 0.0), place, "done")

    def _done(self, place: int) -> None:
        unit, _ = self._working.pop(place)
        self._queue.finished(unit)
        self._give(place)

    def _gone(self, place: int) -> None:
        self._preemptions += 1
        self._held += self._now - self._since[place]
        if place in self._idle:
            self._idle.remove(place)
        if place in self._working:
            unit, began = self._working.pop(place)
            before = self._saved.get(unit.id, 0.0)
            made = before + self._now - began
            self._saved[unit.id] = max(before, made // self._checkpoint_s * self._checkpoint_s)
            self._wasted += made - self._saved[unit.id]
            self._queue.lost(unit, preempted=True)
            if self._idle:
                self._give(self._idle.pop())
        self._start(place)


def percentiles(
    units: Sequence[WorkUnit], unit_s: float, checkpoint_s: float, fleet: Fleet, shares: Sequence[float]
) -> list[Run]:
    """Of ``RUNS`` runs, each figure's own percentile for each of ``shares``."""
    runs = [asdict(simulate(units, unit_s, checkpoint_s, fleet, seed=seed)) for seed in range(RUNS)]
    return [
        Run(**{key: sorted(run[key] for run in runs)[math.ceil(share * RUNS) - 1] for key in runs[0]})
        for share in shares
    ]
