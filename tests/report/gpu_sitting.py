"""Everything that is still unmeasured on a GPU, in one sitting: `python tests/report/gpu_sitting.py OUT [--toy]`.

Each case is a command of its own with a limit of its own, the most wanted first, so that whatever time there is has as
many figures as it has room for. OUT gets a file of results, written anew after each case, and the output of each; a
case that fails or runs out of its time says so there and the others go on. ``--toy`` is the rehearsal on a CPU: the
same commands with the small forms of the jobs, in a few minutes.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

TOY_LIMIT_S = 300
LEAST_S = 20
"""Less is enough for none."""
TOTAL_S = 570
"""Ten minutes, less what the start takes."""
HUNDRED = ("transfer_set.images_per_class=1", f"transfer_set.classes={list(range(0, 1000, 10))}")


@dataclass(frozen=True)
class Case:
    """A command, and its toy form."""

    name: str
    command: tuple[str, ...]
    toy: tuple[str, ...]
    limit_s: int


def synthesis(job: str, *changes: str) -> tuple[str, ...]:
    """The command that makes a job's images in one process."""
    settings = [part for change in ("runtime.executor=local", *changes) for part in ("--set", change)]
    return ("synthesize", f"jobs/{job}.yaml", *settings, "--json")


CASES = (
    Case(
        "1,000 images of DeepInversion",
        synthesis("imagenet-deepinversion", "transfer_set.images_per_class=1"),
        synthesis("imagenet-deepinversion", "scale=smoke"),
        240,
    ),
    Case(
        "1,000 generators, 50 images each",
        synthesis("imagenet-1000-generators"),
        synthesis("imagenet-1000-generators", "scale=smoke"),
        600,
    ),
    Case(
        "EfficientNet-Lite0, a step",
        ("bench", "synthesis", "--case", "efficientnet-lite0-224", "--device", "cuda", "--rounds", "3", "--json"),
        ("bench", "synthesis", "--case", "convnet-32", "--rounds", "1", "--json"),
        120,
    ),
    Case(
        "twenty pictures",
        synthesis("imagenet-dream", "runtime.device=cuda"),
        synthesis("imagenet-dream", "scale=smoke"),
        60,
    ),
    Case(
        "ResNet-50, 100 images at the whole length",
        synthesis("one-gpu", "teacher.weights=random", *HUNDRED),
        ("plan", "jobs/one-gpu.yaml", "--set", "teacher.weights=random", "--json"),
        120,
    ),
    Case(
        "generators as one",
        ("bench", "generators", "--device", "cuda", "--rounds", "1", "--json"),
        ("bench", "generators", "--rounds", "1", "--json"),
        240,
    ),
)


def measured(case: Case, out: Path, *, limit_s: float, is_toy: bool) -> dict[str, Any]:
    """Run a case; what its last line says, how it ended, and how long it took."""
    command = [sys.executable, "-m", "raydfkd", *(case.toy if is_toy else case.command)]
    log = out / f"{CASES.index(case)}.log"
    began = time.perf_counter()
    with log.open("w") as file:
        try:
            ended = subprocess.run(command, stdout=file, stderr=file, timeout=limit_s, check=False).returncode
        except subprocess.TimeoutExpired:
            ended = "out of time"
    seconds = round(time.perf_counter() - began, 1)
    return {**asdict(case), "command": " ".join(command[1:]), "ended": ended, "seconds": seconds, "found": _last(log)}


def _last(log: Path) -> Any:
    lines = log.read_text(errors="replace").strip().splitlines()
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError):
        return lines[-1:]


def device() -> dict[str, str]:
    """What was measured on, and with what."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="for all cases together")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    began = time.perf_counter()
    for case in CASES:
        left = chosen.seconds - (time.perf_counter() - began)
        limit_s = TOY_LIMIT_S if chosen.toy else min(case.limit_s, left)
        if limit_s < LEAST_S:
            break
        results.append(measured(case, chosen.out, limit_s=limit_s, is_toy=chosen.toy))
        sys.stdout.write(f"{case.name}: {results[-1]['ended']}, {results[-1]['seconds']} s, {results[-1]['found']}\n")
        sys.stdout.flush()
        (chosen.out / "results.json").write_text(json.dumps({**device(), "cases": results}, indent=1))


if __name__ == "__main__":
    main()
