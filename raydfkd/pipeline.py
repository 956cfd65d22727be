"""One run from the recipe to the report: check, teach, synthesize and distil, judge, write down."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.console import Console
from torch import Tensor

from raydfkd import __version__
from raydfkd.data.failures import DamagedError
from raydfkd.data.store import Store
from raydfkd.devices import pick_device
from raydfkd.distill.criteria import CRITERIA
from raydfkd.images import PixelRange
from raydfkd.job import Job, SynthesisOutcome, open_job, transfer_set_of
from raydfkd.metrics import MetricsLog, read_metrics
from raydfkd.networks import build_network, count_parameters, load_weights, save_bytes, weights_exist
from raydfkd.progress import Monitor
from raydfkd.real_data import RealData, Split, open_real_data
from raydfkd.recipe import Recipe
from raydfkd.registry import RecipeError
from raydfkd.report import Gallery, write_report
from raydfkd.synthesis.assembly import build_student, build_synthesizer, digest_of, load_teacher
from raydfkd.synthesis.augment import build_augmentations
from raydfkd.teach import teach

GALLERY_IMAGES = 12
METRICS = "metrics.jsonl"


def check(recipe: Recipe) -> RealData | None:
    """Find the user's mistakes before any work; writes nothing but probes, and removes those.

    Builds every part of the run once, on the CPU, with an untrained teacher.

    Raises:
        RecipeError: with key, value and remedy.
    """
    teacher = build_network(recipe.teacher, recipe.teacher, where="teacher", seed=0)
    cpu = torch.device("cpu")
    build_synthesizer(recipe, teacher, cpu, build_student(recipe, lambda _: None, cpu))
    data = None
    if recipe.real_data is not None:
        data = open_real_data(recipe.real_data, recipe.teacher.image_space, recipe.teacher.classes)
    network = build_network(recipe.student, recipe.teacher, where="student", seed=0)
    criterion = recipe.distill.criterion
    CRITERIA.build(criterion.kind, criterion.options, where="distill.criterion")
    build_augmentations(recipe.distill.augment, where="distill.augment")
    if not count_parameters(network):
        raise RecipeError(f"student.network {recipe.student.network} has no weights to train; give another")
    pick_device(recipe.runtime.device)
    Store(recipe.run_dir).probe("run_dir")
    transfer_set_of(recipe, digest="").store.probe()
    if weights_exist(recipe.teacher.weights, where="teacher.weights"):
        teacher, weights = load_teacher(recipe)
        transfer_set_of(recipe, digest_of(recipe, weights)).check()
    elif recipe.teacher.train is None:
        load_weights(teacher, recipe.teacher.weights, where="teacher.weights")
    else:
        check_teacher(recipe)
    return data


def check_teacher(recipe: Recipe) -> None:
    """Find mistakes in what it takes to train the teacher; the rest of the recipe may still be unfinished."""
    if recipe.teacher.train is None or recipe.real_data is None:
        raise RecipeError("teacher.train is missing, so there is nothing to teach; say how, or give teacher.weights")
    if recipe.teacher.weights == "random":
        raise RecipeError('teacher.weights is "random", which nothing is trained for; give the file to write')
    build_network(recipe.teacher, recipe.teacher, where="teacher", seed=0)
    build_augmentations(recipe.teacher.train.augment, where="teacher.train.augment")
    open_real_data(recipe.real_data, recipe.teacher.image_space, recipe.teacher.classes)
    Store(_split(recipe.teacher.weights)[0]).probe("the folder of teacher.weights")


def ensure_teacher(recipe: Recipe, monitor: Monitor, *, again: bool = False) -> None:
    """Train the teacher if its weights are not there yet and the recipe says how."""
    if weights_exist(recipe.teacher.weights, where="teacher.weights") and not again:
        return
    from raydfkd.distill.evaluate import judge, predict  # torchmetrics, which takes longer to import than torch

    check_teacher(recipe)
    spec, real = recipe.teacher.train, recipe.real_data
    assert spec is not None
    assert real is not None
    data = open_real_data(real, recipe.teacher.image_space, recipe.teacher.classes)
    started = time.monotonic()
    device = pick_device(recipe.runtime.device)

    def on_epoch(epoch: int, loss: float) -> None:
        if epoch == spec.epochs or epoch % max(1, spec.epochs // 5) == 0:
            monitor.say("teacher", f"epoch {epoch} of {spec.epochs}   loss {loss:.3f}")

    teacher = teach(recipe, data, device, on_epoch)
    path = recipe.teacher.weights
    folder, name = _split(path)
    Store(folder).put(name, save_bytes(teacher, {"network": recipe.teacher.network}))
    validation = data.load("validation")
    pixels = PixelRange(recipe.teacher.image_space, device)
    logits = predict(teacher, validation.images, pixels)
    top1 = dict(judge(logits, logits, validation.labels))["teacher.top1"]
    monitor.say(
        "teacher",
        f"{recipe.teacher.network} trained on real {real.kind} in {time.monotonic() - started:.0f} s, "
        f"{top1:.1%} on the validation split   {path}",
    )


def _split(path: str) -> tuple[str, str]:
    """Folder and name of a file at a path or URL."""
    folder, slash, name = path.rpartition("/")
    return folder or slash or ".", name


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
        f"{recipe.teacher.classes} classes, {job.planned_images:,} images in {len(job.units)} units, "
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


def evaluate(recipe: Recipe, weights: str, data: RealData | None, *, split: Split = "test") -> dict[str, Any]:
    """Judge a saved student: top-1 of teacher and student on real images, agreement there or on the transfer set."""
    from raydfkd.distill.evaluate import judge, predict  # torchmetrics, as above

    if not weights_exist(weights, where="--student"):
        raise RecipeError(f"--student is {weights!r}: no such file; `raydfkd run` or `distill` writes it")
    device = pick_device(recipe.runtime.device)
    pixels = PixelRange(recipe.teacher.image_space, device)
    teacher, _ = load_teacher(recipe)
    student = build_network(recipe.student, recipe.teacher, where="student", seed=0)
    load_weights(student, weights, where="--student")
    teacher, student = teacher.to(device), student.to(device)
    labels: Tensor | None = None
    if data is not None:
        real = data.load(split)
        images, labels = real.images, real.labels
    else:
        images = _some_images(open_job(recipe), 5000)
    found = dict(judge(predict(student, images, pixels), predict(teacher, images, pixels), labels))
    return {
        "teacher": {"top1": found.get("teacher.top1"), "parameters": count_parameters(teacher)},
        "student": {"top1": found.get("student.top1"), "parameters": count_parameters(student)},
        "agreement": found["agreement"],
        "judged_on": f"{recipe.real_data.kind} {split}" if recipe.real_data else "transfer set",
    }


def _some_images(job: Job, count: int) -> Tensor:
    """The first images of the transfer set, enough parts for ``count`` of them."""
    pieces: list[Tensor] = []
    for commit in job.snapshot().commits:
        for part in commit.parts:
            if sum(map(len, pieces)) < count:
                try:
                    pieces.append(job.transfer_set.read(part).images)
                except DamagedError as damage:
                    job.transfer_set.quarantine(commit, damage)
    if not pieces:
        raise RecipeError(f"transfer_set.uri is {job.recipe.transfer_set.uri}: there is no image yet; synthesize first")
    return torch.cat(pieces)[:count]


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
            "quarantined": len(outcome.quarantined),
        },
        "failures": [
            {"unit": failure.unit, "attempt": failure.attempt, "error": failure.error}
            for failure in outcome.quarantined
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


def gallery(job: Job, class_names: tuple[str, ...], *, images: int = GALLERY_IMAGES) -> Gallery | None:
    """Images of each class of the plan, from different units as far as there are some; None while a class has none."""
    found: dict[int, list[Tensor]] = {label: [] for label in job.recipe.classes}
    sure: dict[int, list[Tensor]] = {label: [] for label in job.recipe.classes}
    for turn in range(images):
        for commit in job.snapshot().commits:
            if all(len(row) >= images for row in found.values()):
                break
            try:
                rows = job.transfer_set.read(commit.parts[0])
            except DamagedError as damage:
                job.transfer_set.quarantine(commit, damage)
                continue
            probabilities = rows.teacher_logits.float().softmax(1)
            for label in found.keys() & set(rows.labels.tolist()):
                places = (rows.labels == label).nonzero().flatten()
                if len(found[label]) < images and turn < len(places):
                    place = places[-1 - turn]  # a unit's last images are those of the longest training
                    found[label].append(rows.images[place])
                    sure[label].append(probabilities[place, label])
    shortest = min(len(row) for row in found.values())
    if not shortest:
        return None
    return Gallery(
        images=torch.stack([torch.stack(row[:shortest]) for row in found.values()]),
        class_names=tuple(class_names[label] for label in found),
        teacher_confidence=torch.stack([torch.stack(row[:shortest]) for row in sure.values()]),
    )


def versions() -> dict[str, str]:
    """What ran, for provenance."""
    found = {"raydfkd": __version__, "python": platform.python_version()}
    for package in ("torch", "torchvision", "ray", "pyarrow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{platform.machine()} CPU"


def command_line() -> str:
    """The command that started this process."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
