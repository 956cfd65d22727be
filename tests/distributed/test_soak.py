"""A thousand tiny units through real actors: what a unit costs beside its work, and what the driver keeps of it.

Run by make test-cluster.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from pathlib import Path

import pytest
from rich.console import Console

from raydfkd.config.load import load_recipe
from raydfkd.job import open_job
from raydfkd.report.metrics import MetricsLog
from raydfkd.runner.events import Events, Listener, MetricsWriter
from raydfkd.runner.progress import Display
from raydfkd.runner.signals import Interruption

pytestmark = pytest.mark.cluster

JOB = Path(__file__).parents[2] / "jobs" / "chaos.yaml"
NUM_UNITS = 1000
WARM_UP = 100


class Stopwatch(Listener):
    """Notes when a unit was done, how long its worker worked on it, and the memory of this process."""

    def __init__(self) -> None:
        self.done: list[tuple[float, float, int]] = []

    def committed(self, commit, *, running):
        self.done.append((time.monotonic(), commit.seconds, resident_bytes()))


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def test_a_thousand_units_cost_little_beside_their_work(ray_cluster, tmp_path):
    from raydfkd.distributed.pool import SynthesisPool  # noqa: PLC0415 - imports Ray

    settings = ["transfer_set.images_per_class=1000", "transfer_set.unit.images_per_class=1", "synthesis.steps=1"]
    settings += ["synthesis.batch_per_class=1", "runtime.workers={min: 1, max: 1}"]
    job = open_job(load_recipe(JOB, settings, str(tmp_path)))
    assert len(job.units) == NUM_UNITS
    stopwatch = Stopwatch()
    metrics = MetricsWriter(MetricsLog(tmp_path / "metrics.jsonl", fresh=True))
    events = Events(metrics, Display(Console(quiet=True)), stopwatch)
    queue = job.begin_synthesis()
    SynthesisPool(job, events).run(queue, lambda: None, Interruption())
    assert len(stopwatch.done) == queue.attempted == NUM_UNITS
    overheads = [
        1000 * (now - before - seconds)
        for (before, _, _), (now, seconds, _) in itertools.pairwise(stopwatch.done[WARM_UP:])
    ]
    growth = (stopwatch.done[-1][2] - stopwatch.done[WARM_UP][2]) / 2**20
    median = statistics.median(overheads)
    late = statistics.quantiles(overheads, n=20)[-1]
    print(f"\nsoak: overhead {median:.1f} ms median, {late:.1f} ms at 95 %; driver {growth:+.1f} MiB")  # noqa: T201
    assert median <= 25
    assert growth < 50
