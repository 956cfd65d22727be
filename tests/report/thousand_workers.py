"""A driver and its store under a thousand workers: `python tests/report/thousand_workers.py`, some minutes.

The pool's real code, a run's listeners and real synthesis workers in simulated time; see `tests/simulated_ray.py`. With
`--memory` the run is made once more, slower, to see what the driver allocates; with `--ray` a Ray that is started here
for some seconds says what its own calls cost, of which the simulation has only the number.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from simulated_ray import Outcome, Weather, drive


def run(weather: Weather, units: int) -> Outcome:
    """Simulate in memory where the system has a folder there: what a disk takes is not the driver's."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        return drive(Path(folder), weather, units)


def lines(found: Outcome, weather: Weather) -> list[str]:
    """What the run took."""
    units, calls = len(found.units), found.calls
    assert found.committed == found.units
    assert len(found.made) == units, "no unit is made twice"
    rate = units / found.simulated_s
    driver, workers = sum(found.driver.values()), sum(found.workers.values())
    busiest = weather.workers / weather.unit_s
    return [
        f"{units:,} units of {weather.unit_s:.0f} s on {weather.workers:,} workers: {found.simulated_s / 60:.0f} min, "
        f"simulated in {found.wall_s:.0f} s; {calls['preemptions']} machines taken away, {found.attempted:,} attempts",
        f"driver: {1e3 * found.driver_s / units:.1f} ms of processor a unit, "
        f"{found.driver_s / found.simulated_s:.1%} of one while it runs ({rate:.2f} units/s)",
        f"Ray: {_each(calls, 'progress', units)} questions, {_each(calls, 'get', units)} answers, "
        f"{_each(calls, 'wait', units)} waits of {calls['refs'] / calls['wait']:.0f} refs a unit",
        f"store, driver: {driver:,} requests, {driver / units:.2f} a unit ({dict(found.driver)})",
        f"store, workers: {workers:,} requests, {workers / units:.2f} a unit ({dict(found.workers)}); "
        f"{(driver + workers) / units * busiest:.1f} requests/s of both while all work",
    ]


def _each(calls: dict[str, int], name: str, units: int) -> str:
    return f"{calls[name] / units:.1f}"


def allocated(weather: Weather, units: int) -> str:
    """What Python allocates in a run, the simulation's own included; how often workers are asked does not matter."""
    weather = replace(weather, unit_s=60.0)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    run(weather, units)
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (
        f"memory: at most {(peak - before) / 2**20:.0f} MiB allocated, {(peak - before) / units / 1024:.1f} KiB a "
        f"unit; {(after - before) / 2**20:.0f} MiB left in the end"
    )


def ray_costs(refs: int) -> str:
    """Microseconds of the processor that Ray's calls take in a driver with so many calls that are under way."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # or a token would be left behind
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    actor_class = ray.remote(concurrency_groups={"control": 1})(_Busy)
    actor = actor_class.remote()
    ray.get(actor.answer.remote())
    pending = [actor.wait.remote() for _ in range(refs)]
    waiting = _microseconds(lambda: ray.wait(pending, timeout=0), 50)
    asking = _microseconds(lambda: ray.get(actor.answer.options(concurrency_group="control").remote()), 300)
    ray.shutdown()
    return (
        f"Ray's own: a wait for {refs:,} refs {waiting:.0f} us of processor, a question with its answer {asking:.0f} us"
    )


class _Busy:
    def wait(self) -> None:
        time.sleep(600)

    def answer(self) -> int:
        return 1


def _microseconds(act: Callable[[], object], times: int) -> float:
    act()
    began = time.process_time()
    for _ in range(times):
        act()
    return (time.process_time() - began) / times * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1024)
    parser.add_argument("--units", type=int, default=13_000)
    parser.add_argument("--unit-s", type=float, default=300.0)
    parser.add_argument("--preempt-per-hour", type=float, default=0.1)
    parser.add_argument("--memory", action="store_true", help="also what the driver allocates")
    parser.add_argument("--ray", action="store_true", help="also what Ray's own calls cost")
    options = parser.parse_args()
    torch.set_num_threads(1)
    weather = Weather(workers=options.workers, unit_s=options.unit_s, preempt_per_hour=options.preempt_per_hour)
    if options.ray:
        _say(ray_costs(options.workers))
    for line in lines(run(weather, options.units), weather):
        _say(line)
    if options.memory:
        _say(allocated(weather, options.units))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
