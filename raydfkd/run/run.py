"""One run from the recipe to the report."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from rich.console import Console
from torch import Tensor

from raydfkd import __version__
from raydfkd.config.recipe import Recipe
from raydfkd.devices import device_name, pick_device
from raydfkd.images.real_data import RealData
from raydfkd.job import Job, SynthesisOutcome
from raydfkd.networks.build import count_parameters
from raydfkd.report.metrics import MetricsLog, read_metrics
from raydfkd.report.page import write_report
from raydfkd.report.provenance import versions
from raydfkd.run.gallery import gallery
from raydfkd.run.progress import Monitor
from raydfkd.store.store import Store

METRICS = "metrics.jsonl"


@contextlib.contextmanager
def monitored(recipe: Recipe, console: Console) -> Iterator[Monitor]:
    """A monitor that writes the run's metrics."""
    folder = Path(recipe.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with Monitor(console, MetricsLog(folder / METRICS, fresh=False)) as monitor:
        yield monitor


def announce(job: Job, monitor: Monitor) -> None:
    """Say what will be done and what is done already."""
    recipe = job.recipe
    done = job.snapshot()
    student = count_parameters(job.fresh_student())
    monitor.planned(
        images=job.planned_images,
        images_before=done.images,
        units_before=len(done.commits),
        student_steps=recipe.distill.steps,
        training=job.student_digest[:8],
    )
    monitor.say(
        "plan",
        f"{len(recipe.classes):,} classes, {job.planned_images:,} images in {len(job.units)} units, "
        f"student of {student:,} parameters",
    )
    if done.commits:
        monitor.say("plan", f"{len(done.commits)} of {len(job.units)} units are there already; going on from them")


def save_student(job: Job, state: Mapping[str, Tensor]) -> Path:
    """Write student.safetensors with its recipe in the metadata."""
    path = Path(job.recipe.run_dir) / "student.safetensors"
    metadata = {"recipe": json.dumps(job.recipe.shown()), "digest": job.student_digest, "raydfkd": __version__}
    plain = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    Store(str(path.parent)).put(path.name, safetensors.torch.save(plain, metadata))
    return path


def report(
    job: Job, judged: Mapping[str, Any], monitor: Monitor, outcome: SynthesisOutcome, *, seconds: float, command: str
) -> dict[str, Any]:
    """Put the report together; :func:`write` saves it. Scripts rely on the keys."""
    snapshot = job.snapshot()
    return {
        **judged,
        "recipe": job.recipe.shown(),
        "seed": job.recipe.seed,
        "images": snapshot.images,
        "images_per_second": round(monitor.images_per_second, 3),
        "units": {
            "planned": len(job.units),
            "committed": len(snapshot.commits),
            "attempted": outcome.attempted,
            "quarantined": len(outcome.given_up),
        },
        "failures": [
            {"unit": failure.unit, "attempt": failure.attempt, "error": failure.error} for failure in outcome.given_up
        ],
        "seconds": {
            "total": round(seconds, 1),
            "synthesis": round(monitor.synthesis_seconds, 1),
            "distillation": round(monitor.distillation_seconds, 1),
        },
        "content_digest": snapshot.content_digest(),
        "recipe_digest": job.digest,
        "versions": versions(),
        "device": device_name(pick_device(job.recipe.runtime.device)),
        "command": command,
    }


def write(job: Job, found: Mapping[str, Any], data: RealData | None) -> Path:
    """Write report.json and report.html; returns the page's path."""
    folder = Path(job.recipe.run_dir)
    names = data.class_names if data is not None else tuple(str(label) for label in range(job.recipe.teacher.classes))
    metrics = [
        entry
        for entry in read_metrics(folder / METRICS)
        if entry["event"] != "student" or entry.get("training") == job.student_digest[:8]
    ]
    write_report(folder, found, metrics=metrics, gallery=gallery(job, names))
    return folder / "report.html"
