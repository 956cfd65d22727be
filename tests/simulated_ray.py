"""A cluster in simulated time under the pool's real code: the few names of Ray's that it calls, actors, and a clock.

Machines are places of one worker each; one that is taken away is followed by another. A real synthesis worker in this
process stands for all actors and makes a unit when its simulated time is over: it reads and writes the set as on a
cluster, by a ``Job`` of its own. The time that goes into the simulation and the worker is kept apart from the rest,
which is the driver's.
"""

from __future__ import annotations

import contextlib
import heapq
import io
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import ray.exceptions
import torch
from rich.console import Console

from raydfkd.config.load import load_recipe
from raydfkd.data import news
from raydfkd.distributed import lookout, pool
from raydfkd.distributed.actor import Place, Work
from raydfkd.job import Job, dependencies_of, job_of
from raydfkd.networks.teacher import Teacher, open_teacher
from raydfkd.report.metrics import MetricsLog
from raydfkd.runner import events, progress
from raydfkd.runner.signals import Interruption
from raydfkd.store.store import Store
from raydfkd.synthesis.checkpoint import Interrupted
from raydfkd.synthesis.worker import SynthesisWorker
from raydfkd.units import UnitProgress, WorkUnit

PAGE = 1000
"""Objects that an object store lists in a request."""


@dataclass(frozen=True, kw_only=True)
class Weather:
    """What the simulated cluster is like."""

    workers: int
    unit_s: float = 300.0
    """Mean time of a unit; each takes from 0.8 to 1.2 times as long."""
    steps: int = 3000
    """Steps of a unit, for how far it is."""
    build_s: float = 20.0
    """Until an actor is ready on a machine that is there."""
    start_s: float = 180.0
    """Until a machine is there in the place of one that was taken away."""
    notice_s: float = 10.0
    """Until Ray knows that a machine has gone without a word."""
    preempt_per_hour: float = 0.0
    """Times an hour that a machine is taken away; every second one has been told, and saves its unit."""
    seed: int = 0


class Call:
    """What Ray calls an object ref: of something that an actor does."""

    def __init__(self) -> None:
        self.is_done = False
        self.result: object = None
        self.error: Exception | None = None

    def end(self, result: object = None, error: Exception | None = None) -> None:
        """There is a result."""
        if not self.is_done:
            self.is_done, self.result, self.error = True, result, error


@dataclass(eq=False)
class Actor:
    """A worker, from the request for it to its end."""

    cluster: Cluster
    place: int | None = None
    node: str = ""
    is_dead: bool = False
    calls: list[Call] = field(default_factory=list)
    """Those without a result."""
    unit: WorkUnit | None = None
    attempt: int = 1
    began: float = 0.0
    ends: float = 0.0
    told: float = 0.0
    """Time of the last look at the objective that was told of."""

    def __getattr__(self, name: str) -> SimpleNamespace:
        if name not in ("ready", "run", "progress", "leave"):
            raise AttributeError(name)
        return SimpleNamespace(remote=lambda *given: self.cluster.call(self, name, *given))


def of_the_cluster(method: Callable) -> Callable:
    """The time in this is not the driver's."""

    @wraps(method)
    def timed(self: Cluster, *given, **named):
        began = time.perf_counter()
        try:
            return method(self, *given, **named)
        finally:
            self.own_s += time.perf_counter() - began

    return timed


class Cluster:
    """Machines, actors and time.

    Args:
        weather: what it is like.
        worker: makes units, for all actors.
    """

    def __init__(self, weather: Weather, worker: Worker) -> None:
        self.weather, self.worker = weather, worker
        self.now = 0.0
        self.counts: Counter[str] = Counter()
        """How often each name of Ray's was called, ``refs`` that were waited for, and what happened to machines."""
        self.own_s = 0.0
        self._rng = random.Random(weather.seed)
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._free = list(range(weather.workers))
        self._waiting: list[Actor] = []
        self._at: dict[int, Actor | None] = {}
        self._machines = Counter[int]()
        self._nodes: set[str] = set()
        for place in range(weather.workers):
            self._machine_starts(place)

    # What the pool calls

    def options(self, **_: object) -> SimpleNamespace:
        return SimpleNamespace(remote=self.new_actor)

    @of_the_cluster
    def new_actor(self, *_: object) -> Actor:
        self.counts["actors"] += 1
        actor = Actor(self)
        self._waiting.append(actor)
        self._place_actors()
        return actor

    @of_the_cluster
    def call(self, actor: Actor, name: str, *given) -> Call:
        self.counts[name] += 1
        call = Call()
        if actor.is_dead:
            call.end(error=ray.exceptions.ActorDiedError())
            return call
        actor.calls.append(call)
        getattr(self, f"_{name}")(actor, call, *given)
        return call

    @of_the_cluster
    def wait(self, calls: list[Call], *, num_returns: int = 1, timeout: float) -> tuple[list[Call], list[Call]]:
        self.counts["wait"] += 1
        self.counts["refs"] += len(calls)
        until = self.now + timeout
        while (ready := sum(call.is_done for call in calls)) < num_returns and self._advance(until):
            pass
        done = [call for call in calls if call.is_done][: min(ready, num_returns)]
        return done, []  # what is left nobody looks at

    @of_the_cluster
    def get(self, call: Call) -> object:
        self.counts["get"] += 1
        assert call.is_done, "nobody waits for what was not waited for"
        if call.error is not None:
            raise call.error
        return call.result

    @of_the_cluster
    def kill(self, actor: Actor) -> None:
        self.counts["kill"] += 1
        self._ends(actor, ray.exceptions.ActorDiedError())

    @of_the_cluster
    def sleep(self, seconds: float) -> None:
        until = self.now + seconds
        while self._advance(until):
            pass

    def monotonic(self) -> float:
        return self.now

    def is_there(self, node: str) -> bool:
        return node in self._nodes

    def node_of(self, actor: Actor) -> str:
        return actor.node

    # What actors do

    def _ready(self, actor: Actor, call: Call) -> None:
        if actor.node:
            self._later(self.weather.build_s, lambda: call.end(Place(node=actor.node, device="simulated")))
        # else once it has a place

    def _run(self, actor: Actor, call: Call, unit: WorkUnit, attempt: int) -> None:
        share = self.worker.share_left(unit)
        seconds = share * self.weather.unit_s * self._rng.uniform(0.8, 1.2)
        actor.unit, actor.attempt, actor.began, actor.told = unit, attempt, self.now, self.now
        actor.ends = self.now + seconds

        def ended() -> None:
            if actor.unit is unit and not actor.is_dead:
                actor.unit = None
                actor.calls.remove(call)
                call.end(Work(record=self.worker.make(unit, attempt), news=[]))

        self._later(seconds, ended)

    def _progress(self, actor: Actor, call: Call) -> None:
        actor.calls.remove(call)
        call.end(self._news(actor))

    def _leave(self, actor: Actor, call: Call) -> None:
        raise AssertionError("nobody interrupts the run")

    def _news(self, actor: Actor) -> list[UnitProgress]:
        """How far the unit is, with its objective every fifty steps."""
        if actor.unit is None:
            return []
        share = (self.now - actor.began) / (actor.ends - actor.began)
        objective: dict[str, float] = {}
        if self.now - actor.told >= 50 * self.weather.unit_s / self.weather.steps:
            actor.told = self.now
            objective = {"step": float(int(share * self.weather.steps)), "total": 2 - share, "cross_entropy": 1 - share}
        step = int(share * self.weather.steps)
        return [UnitProgress(unit=actor.unit.id, step=step, steps=self.weather.steps, objective=objective)]

    # What happens to machines

    def _machine_starts(self, place: int) -> None:
        self._machines[place] += 1
        node = f"{place}-{self._machines[place]}"
        self._nodes.add(node)
        self._at[place] = None
        if place not in self._free:
            self._free.append(place)
        if self.weather.preempt_per_hour:
            seconds = self._rng.expovariate(self.weather.preempt_per_hour / 3600)
            self._later(seconds, lambda: self._machine_goes(place, node))
        self._place_actors()

    def _machine_goes(self, place: int, node: str) -> None:
        self.counts["preemptions"] += 1
        self._nodes.discard(node)
        if place in self._free:
            self._free.remove(place)
        actor = self._at.pop(place)
        if actor is not None:
            actor.place = None
            self._leaves_or_dies(actor)
        self._later(self.weather.start_s, lambda: self._machine_starts(place))

    def _leaves_or_dies(self, actor: Actor) -> None:
        unit = actor.unit
        if unit is not None and self.counts["preemptions"] % 2:
            self.counts["told"] += 1
            share = (self.now - actor.began) / (actor.ends - actor.began)
            self.worker.leave(unit, actor.attempt, share)
            actor.unit = None
            for call in actor.calls:
                call.end(Work(record=None, news=[]))
            actor.calls.clear()
            return
        actor.unit = None
        self._later(self.weather.notice_s, lambda: self._ends(actor, ray.exceptions.ActorDiedError()))

    def _place_actors(self) -> None:
        while self._free and self._waiting:
            actor = self._waiting.pop(0)
            if not actor.is_dead:
                place = self._free.pop()
                actor.place, actor.node, self._at[place] = place, f"{place}-{self._machines[place]}", actor
                for call in actor.calls:
                    self._ready(actor, call)

    def _ends(self, actor: Actor, error: Exception) -> None:
        if actor.is_dead:
            return
        actor.is_dead, actor.unit = True, None
        for call in actor.calls:
            call.end(error=error)
        actor.calls.clear()
        if actor.place is not None:
            self._at[actor.place] = None
            self._free.append(actor.place)
            actor.place = None
            self._place_actors()

    # Time

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), act))

    def _advance(self, until: float) -> bool:
        """Let the next thing happen, or nothing until then; whether there is time left."""
        if not self._events or self._events[0][0] > until:
            self.now = until
            return False
        self.now, _, act = heapq.heappop(self._events)
        act()
        return True


class Worker:
    """One real synthesis worker that makes the units of all simulated actors, at once when their time has come."""

    def __init__(self, job: Job, teacher: Teacher) -> None:
        self.job = job
        self.made: list[str] = []
        self._stops = False
        self._shares: dict[str, float] = {}
        self._worker = SynthesisWorker(job, teacher, device=torch.device("cpu"), should_stop=lambda: self._stops)

    def share_left(self, unit: WorkUnit) -> float:
        """Share of the unit's work that no saved state has."""
        return 1 - self._shares.get(unit.id, 0.0)

    def make(self, unit: WorkUnit, attempt: int) -> bytes:
        """Commit a unit; returns the record."""
        self.made.append(unit.id)
        return self._worker.run(unit, attempt).to_json()

    def leave(self, unit: WorkUnit, attempt: int, share: float) -> None:
        """Save the state of a unit, of which so much was done since it was taken."""
        self._shares[unit.id] = 1 - self.share_left(unit) * (1 - share)
        self._stops = True
        with contextlib.suppress(Interrupted):
            self._worker.run(unit, attempt)
        self._stops = False


class AtOnce:
    """A thread whose work is done when it starts, so that a run in simulated time is the same each time."""

    def __init__(self, *, target: Callable[[], None], **_: object) -> None:
        self.start = target


@contextlib.contextmanager
def simulated(cluster: Cluster) -> Iterator[None]:
    """The pool, and what it works with, see this cluster and its clock."""
    clock = SimpleNamespace(monotonic=cluster.monotonic, sleep=cluster.sleep)
    calls = SimpleNamespace(wait=cluster.wait, get=cluster.get, kill=cluster.kill)
    machines = {"is_there": cluster.is_there, "node_of": cluster.node_of}
    with contextlib.ExitStack() as stack:
        for module, names in {
            pool: {"ray": calls, "time": clock, "ACTOR": cluster, **machines},
            lookout: {"time": clock, "threading": SimpleNamespace(Thread=AtOnce)},
            news: {"time": clock},
            events: {"time": clock},
            progress: {"time": clock},
        }.items():
            stack.enter_context(patch.multiple(module, **names))
        yield


def count_requests(store: Store) -> Counter[str]:
    """Requests that an object store would get for what is asked of ``store`` from now on, by kind.

    A listing is one for each thousand objects; a part is small enough for one.
    """
    counts: Counter[str] = Counter()
    folder = store._folder

    def counted(kind: str) -> Callable:
        act = getattr(folder, kind)

        def call(*given):
            counts[kind] += 1
            result = act(*given)
            if kind in ("names", "entries"):
                counts[kind] += max(0, -(-len(result) // PAGE) - 1)
            return result

        return call

    class Counted:
        def __getattr__(self, name: str) -> object:
            return counted(name)

    store._folder = Counted()
    return counts


RECIPE = """
name: simulated
teacher:
  network: convnet
  options: {{widths: [4]}}
  classes: 10
  image_space: {{channels: 1, size: 8, mean: [0.4], std: [0.3]}}
  weights: random
student: {{network: convnet, options: {{widths: [4]}}}}
synthesis: {{synthesizer: noise_images, batch_size: 10, targets: none}}
transfer_set: {{images_per_class: {units}, unit: {{classes: 10, images_per_class: 1}}}}
distill: {{steps: 1, batch_size: 1, criterion: soft_kl, optimizer: {{lr: 0.01}}}}
runtime: {{device: cpu, workers: {{min: 0, max: {workers}}}}}
"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a simulated run took."""

    simulated_s: float
    """Until the last unit was done."""
    driver_s: float
    """Seconds of the processor in the driver."""
    wall_s: float
    """Seconds that the simulation took, all in all."""
    attempted: int
    calls: Counter[str]
    """Of Ray, by name; see ``Cluster.counts``."""
    made: list[str]
    """Units that workers have committed, one after another."""
    committed: frozenset[str]
    """Units that are in the set."""
    units: frozenset[str]
    """Units of the plan."""
    driver: Counter[str]
    """Requests of the driver to the store, by kind."""
    workers: Counter[str]
    """Requests of all workers."""


def plan_of(job: Job) -> events.Plan:
    """What is announced of a run that begins."""
    return events.Plan(
        job=job.digest,
        training=job.training_name,
        images=job.planned_images,
        units=len(job.units),
        images_before=0,
        units_before=0,
        student_steps=1,
    )


def drive(folder: Path, weather: Weather, units: int) -> Outcome:
    """Run the pool over so many units in simulated time, with all that a run's driver does beside."""
    folder.mkdir(exist_ok=True)
    source = folder / "simulated.yaml"
    source.write_text(RECIPE.format(units=units, workers=weather.workers))
    recipe = load_recipe(source, [], str(folder / "run"))
    teacher = open_teacher(recipe)
    made_of = dependencies_of(recipe, teacher)
    job, worker = job_of(recipe, made_of), Worker(job_of(recipe, made_of), teacher)
    of_workers = count_requests(worker.job.transfer_set.store)
    of_driver = count_requests(job.transfer_set.store)
    cluster = Cluster(weather, worker)
    with simulated(cluster), MetricsLog(folder / "metrics.jsonl", fresh=True) as metrics:
        display = progress.Display(Console(file=io.StringIO()))
        told = events.Events(events.MetricsWriter(metrics), display)
        began, cpu, others = time.perf_counter(), time.process_time(), cluster.own_s
        queue = job.begin_synthesis()
        told.planned(plan_of(job))
        pool.SynthesisPool(job, told).run(queue, lambda: None, Interruption())
        job.end_synthesis(queue)
        wall_s = time.perf_counter() - began
        # A clock of the processor takes long to read on some machines, so only its share is taken by the wall's.
        driver_s = (time.process_time() - cpu) * (1 - (cluster.own_s - others) / wall_s)
    return Outcome(
        simulated_s=cluster.now,
        driver_s=driver_s,
        wall_s=wall_s,
        attempted=queue.attempted,
        calls=cluster.counts,
        made=worker.made,
        committed=frozenset(job.transfer_set.committed()),
        units=frozenset(job.unit_ids),
        driver=of_driver,
        workers=of_workers,
    )
