"""Metrics of a run of any size, and what its report costs: ``python tests/report/long_run.py 20000``."""

from __future__ import annotations

import json
import random
import resource
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

from raydfkd.report.charts import Curves
from raydfkd.report.metrics import StatsReader, read_metrics
from raydfkd.report.page import report_page

LOOKS = 62
"""Looks at the objective of a unit: 3,000 steps, one in 50 and both ends."""


def write_metrics(path: Path, units: int, *, looks: int = LOOKS, student_steps: int = 2000) -> None:
    """Write what a run of so many units leaves, sixteen of them at work at any time."""
    rng, now = random.Random(0), 1.7e9
    with path.open("w") as file:

        def write(event: str, **values: object) -> None:
            file.write(json.dumps({"event": event, "time": round(now, 6), **values}) + "\n")

        write("session", job="this", training="student", images=10 * units, images_before=0, units_before=0)
        write("synthesis")
        for first in range(0, units, 16):
            batch = [
                f"r{unit // 100:03d}-c{unit % 100:04d}-{unit % 100:04d}"
                for unit in range(first, min(first + 16, units))
            ]
            for look in range(looks):
                for unit in batch:
                    now += 0.01
                    terms = {
                        "cross_entropy": rng.random(),
                        "bn_moments": 5 * rng.random(),
                        "total_variation": rng.random(),
                    }
                    write("objective", unit=unit, step=50 * look or 1, total=sum(terms.values()), **terms)
            for unit in batch:
                write("unit", unit=unit, images=10, seconds=12.345, objective=rng.random(), attempt=1)
        for step in range(student_steps):
            now += 1
            write("student", training="student", step=50 * step or 1, loss=rng.random(), agreement=rng.random(),
                  images_seen=step, snapshot_images=10 * units)  # fmt: skip


def read_and_render(path: Path) -> tuple[int, str]:
    """The images in the metrics, and the page."""
    stats, curves = StatsReader(job="this", training="student"), Curves("student")
    for event in read_metrics(path):
        stats.add(event)
        curves.add(event)
    report = {
        "recipe": {"name": "long", "teacher": {"network": "teacher"}, "student": {"network": "student"}},
        "seed": 1,
        "teacher": {"top1": None, "parameters": 1},
        "student": {"top1": None, "parameters": 1},
        "agreement": 0.9,
        "judged_on": "synthetic images that were held out",
        "images": stats.stats().images,
        "images_per_second": 1.0,
        "units": {"planned": 1, "committed": 1, "attempted": 1, "quarantined": 0},
        "failures": [],
        "seconds": {"total": 1.0},
        "content_digest": "",
        "recipe_digest": "",
        "versions": {},
        "device": "cpu",
        "command": "",
    }
    return stats.stats().images, report_page(report, curves=curves, gallery=None)


def main(units: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        write_metrics(path, units)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began, cpu = time.perf_counter(), time.process_time()
        read_and_render(path)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tracemalloc.start()
        read_and_render(path)
        peak = tracemalloc.get_traced_memory()[1]
        size = path.stat().st_size
    sys.stdout.write(
        f"{units:,} units, {size / 2**20:.0f} MiB of metrics: {seconds:.1f} s ({cpu:.1f} s of CPU), process "
        f"{before / 1024:.0f} -> {after / 1024:.0f} MiB, allocated by Python at most {peak / 2**20:.0f} MiB\n"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
