"""The queue at the size of a large run: a discrete-event simulation of a cluster that loses workers all the time."""

from __future__ import annotations

import heapq
import random
import time
from collections import Counter

import pytest

from raydfkd.units import UnitQueue, plan_units

CLASSES_PER_UNIT = 10
SHARES = {"preempted": 0.01, "died": 0.01, "failed": 0.002}
"""How attempts end that are not committed; so few that no unit is set aside by chance."""


class Cluster:
    """Workers that take units, are busy for a random time, and come back some time after they were lost."""

    def __init__(self, queue, workers, *, killers, seed):
        self.queue, self.killers = queue, killers
        self.rng = random.Random(seed)
        self.finished, self.lost = Counter(), Counter()
        self.idle, self.events = list(range(workers)), []

    def run(self):
        self.give_work(now=0.0)
        while self.events:
            now, worker, unit, end = heapq.heappop(self.events)
            if unit is None or not self.report(unit, end):
                self.idle.append(worker)
            else:
                heapq.heappush(self.events, (now + self.rng.expovariate(1 / 300), worker, None, "restarted"))
            self.give_work(now)

    def give_work(self, now):
        while self.idle and (unit := self.queue.take()) is not None:
            event = (now + self.rng.expovariate(1 / 60), self.idle.pop(), unit, self.end_of(unit))
            heapq.heappush(self.events, event)

    def end_of(self, unit):
        if unit.id in self.killers:
            return "died"
        draw = self.rng.random()
        for end, share in SHARES.items():
            draw -= share
            if draw < 0:
                return end
        return "committed"

    def report(self, unit, end):
        """Tell the queue; returns whether the worker is gone."""
        if end == "committed":
            self.finished[unit.id] += 1
            self.queue.finished(unit)
        elif end == "failed":
            self.queue.failed(unit, "no luck")
        else:
            self.lost[end] += 1
            self.queue.lost(unit, preempted=end == "preempted")
        return end in ("preempted", "died")


def plan_of(count):
    return plan_units(
        seed=0,
        classes=range(100 * CLASSES_PER_UNIT),
        images_per_class=count // 100,
        classes_per_unit=CLASSES_PER_UNIT,
        images_per_class_per_unit=1,
    )


@pytest.mark.parametrize(
    ("count", "limit_us"),
    [
        # CPU time swells with what else the machine does: ten times the promise, where nobody looks at the number.
        pytest.param(50_000, 500, id="fifty-thousand"),
        pytest.param(1_000_000, 50, id="a-million", marks=pytest.mark.cluster),
    ],
)
def test_units_on_4096_workers_that_come_and_go_are_each_done_exactly_once_and_cheaply(count, limit_us):
    units = plan_of(count)
    killers = {unit.id for unit in units[:: count // 20]}
    cluster = Cluster(queue := UnitQueue(units), workers=4096, killers=killers, seed=0)
    began = time.process_time()
    cluster.run()
    us_per_unit = (time.process_time() - began) / count * 1e6  # simulation included, which is most of it

    assert queue.is_drained
    assert {failure.unit for failure in queue.given_up} == killers
    assert cluster.finished == dict.fromkeys({unit.id for unit in units} - killers, 1)
    assert min(cluster.lost.values()) > count * 0.009
    assert us_per_unit < limit_us, f"{us_per_unit:.1f} us of CPU time for a unit"
