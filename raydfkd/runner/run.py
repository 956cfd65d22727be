"""One run from the recipe to the report, and its parts, for the command line and the library."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from raydfkd import __version__
from raydfkd.config.recipe import Recipe
from raydfkd.data.transfer_set import TransferSet
from raydfkd.errors import RecipeError
from raydfkd.images.picture_folder import UnlabelledFolder, stream_folder
from raydfkd.images.real_data import Split
from raydfkd.job import Job, SynthesisOutcome, asks_student, open_job
from raydfkd.networks.build import build_network, count_parameters
from raydfkd.networks.probe import probe_teacher
from raydfkd.networks.teacher import Teacher
from raydfkd.networks.weights import load_weights, state_bytes, weights_exist
from raydfkd.report.charts import Curves
from raydfkd.report.metrics import MetricsLog, RunStats, StatsReader, read_metrics
from raydfkd.report.page import Gallery, pictures_page, read_report, report_json, report_page
from raydfkd.report.provenance import command_line, versions
from raydfkd.report.redaction import redacted
from raydfkd.report.sheet import gallery_sheet
from raydfkd.runner.check import Prepared, check
from raydfkd.runner.events import Events, Listener, MetricsWriter, Plan
from raydfkd.runner.executor import executor_of
from raydfkd.runner.gallery import gallery
from raydfkd.runner.judge import class_names, judge_by_pictures, judge_student, look_at_images, skipped_line
from raydfkd.runner.progress import Display
from raydfkd.runner.teach import teach
from raydfkd.runner.verify import verify, with_opinion
from raydfkd.runner.view import SetView
from raydfkd.store.store import Store
from raydfkd.synthesis.build import is_live

METRICS = "metrics.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result of a run."""

    job: Job
    outcome: SynthesisOutcome
    missing: frozenset[str]
    """Units of the plan that are not in the set."""
    report: Mapping[str, Any]
    """Content of report.json; empty where there was no image to train on."""
    student: Path | None = None
    """File of the student's weights."""
    page: Path | None = None
    """The report for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthesis:
    """The result of a synthesis without a student."""

    job: Job
    outcome: SynthesisOutcome
    view: SetView
    stats: RunStats
    """Totals of all sessions."""
    page: Path | None
    """Page of pictures; None where there are none."""
    verified: Mapping[str, Any]
    """Keys ``verifier`` and ``moment_distance``, see ``runner.verify``."""

    @property
    def missing(self) -> frozenset[str]:
        """Units of the plan that are not in the set."""
        return frozenset(self.view.missing)

    @property
    def summary(self) -> dict[str, Any]:
        """The figures that scripts and people are told."""
        snapshot, job = self.view.snapshot, self.job
        return {
            "images": snapshot.images,
            "images_per_second": round(self.stats.images_per_second, 3),
            "units": f"{len(snapshot.commits)}/{len(job.units)}",
            "content_digest": snapshot.content_digest(),
            "transfer_set": redacted(job.recipe.transfer_set.uri),
            "gallery": None if self.page is None else str(self.page),
            **self.verified,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """The result of a training on images that were there."""

    job: Job
    student: nn.Module
    """The student in eval mode, on the CPU."""
    stats: RunStats
    """Totals of all sessions."""

    @property
    def summary(self) -> dict[str, Any]:
        """The figures that scripts and people are told."""
        return {
            "student": str(student_path(self.job.recipe)),
            "images": self.job.snapshot().images,
            "student_images": self.stats.student_images,
        }


def run(recipe: Recipe, *, console: Console | None = None) -> Result:
    """Do everything that the recipe says: teach if needed, synthesize and distil at once, judge, report.

    The images and checkpoints of an earlier run stay, and the run resumes from them.

    Args:
        recipe: what to do.
        console: where people read; nobody unless given.

    Raises:
        RecipeError: the recipe is wrong; nothing was written.
        KeyboardInterrupt: it was interrupted; the same call resumes.
    """
    prepared = check(recipe)
    with listening(recipe, console) as events:
        teacher = _teacher(prepared, events)
        other = "" if prepared.not_data_free is None else "other "
        events.say("teacher", f"from here on no {other}real image is read")
        job = open_job(recipe, teacher)
        announce(job, events)
        outcome, state = executor_of(recipe).run(job, teacher, events)
    view = SetView(job)
    if not view.snapshot.images:
        return Result(job=job, outcome=outcome, missing=frozenset(view.missing), report={})
    weights = save_student(job, state)
    judged = judge_student(job, teacher, student_of(recipe, state), view, prepared.data)
    judged |= verify(job, teacher, prepared.verifier, view, prepared.data)
    stats, curves = metrics_of(job)
    found = report(job, judged, view, outcome, stats, command=command_line(), prepared=prepared)
    page = write(job, found, view, curves, prepared)
    return Result(job=job, outcome=outcome, missing=frozenset(view.missing), report=found, student=weights, page=page)


def synthesize(recipe: Recipe, *, console: Console | None = None) -> TransferSet:
    """Make the recipe's images, or those that are missing; the set can be iterated, part by part.

    Raises:
        RecipeError: the recipe is wrong; nothing was written.
    """
    return synthesize_job(recipe, console=console).job.transfer_set


def synthesize_job(recipe: Recipe, *, console: Console | None = None) -> Synthesis:
    """Do as ``synthesize``; returns also how it ended and a page of pictures.

    Raises:
        RecipeError: its images are made against the student, who is trained beside them, so only ``run`` makes them.
    """
    prepared = check(recipe)
    if recipe.rounds > 1 or is_live(recipe):
        raise RecipeError("the images are made against the student, who is trained beside them; use run")
    with listening(recipe, console) as events:
        teacher = _teacher(prepared, events)
        job = open_job(recipe, teacher)
        announce(job, events)
        outcome = executor_of(recipe).synthesize(job, job.phases[-1], teacher, events)
    view = SetView(job)
    stats, curves = metrics_of(job)
    verified = verify(job, teacher, prepared.verifier, view, prepared.data)
    page = write_gallery(job, view, curves, prepared, verified)
    return Synthesis(job=job, outcome=outcome, view=view, stats=stats, page=page, verified=verified)


def distill(recipe: Recipe, images: TransferSet | None = None, *, console: Console | None = None) -> nn.Module:
    """Train the recipe's student on its transfer set; returns it in eval mode, and writes student.safetensors.

    Args:
        recipe: what to train, and how.
        images: the set that ``synthesize`` returned, to make sure that it is the recipe's.
        console: where people read; nobody unless given.

    Raises:
        RecipeError: the recipe is wrong, ``images`` are of another one, or there are none.
    """
    return distill_job(recipe, images, console=console).student


def distill_job(recipe: Recipe, images: TransferSet | None = None, *, console: Console | None = None) -> Distillation:
    """Do as ``distill``; returns the student with its job."""
    prepared = check(recipe, writes_set=asks_student(recipe))
    with listening(recipe, console) as events:
        teacher = _teacher(prepared, events)
        job = open_job(recipe, teacher)
        if images is not None and images.digest != job.digest:
            raise RecipeError("images are of another recipe or teacher; distil with the recipe that made them")
        announce(job, events)
        if job.snapshot().images < job.planned_images and not job.is_closed:
            events.say("student", "the set is not complete yet; training keeps pace with whoever makes it")
        state = executor_of(recipe).distill(job, job.phases[-1], teacher, events)
    if not state:
        raise RecipeError(f"transfer_set.uri is {recipe.transfer_set.uri}: no image came of its synthesis")
    save_student(job, state)
    return Distillation(job=job, student=student_of(recipe, state), stats=metrics_of(job)[0])


def evaluate(
    recipe: Recipe,
    student: str | os.PathLike[str] | None = None,
    *,
    split: Split | None = None,
    pictures: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Judge a saved student, the recipe's own unless its weights are given; ``judge_student`` says what it returns.

    Args:
        recipe: of the student and its teacher.
        student: weights.
        split: of the recipe's real data; test unless given.
        pictures: folder of pictures without labels that judge in their place, by how often both networks agree.

    Raises:
        RecipeError: there are no such weights, they are of another network, there are no real data to split, or there
            is no picture in the folder.
    """
    if split is not None and pictures is not None:
        raise RecipeError(f"--split is {split!r}, but --pictures has no splits; drop either")
    if split is not None and recipe.real_data is None:
        raise RecipeError(
            f"--split is {split!r}, but the recipe has no real_data that it could be of; give real_data or no --split"
        )
    folder = None if pictures is None else stream_folder(str(pictures), recipe.teacher.image_space, where="--pictures")
    prepared = check(recipe, writes_run=False, writes_set=False)
    return judge_saved(prepared, str(student or student_path(recipe)), split=split or "test", folder=folder)


def judge_saved(
    prepared: Prepared, weights: str, *, split: Split, folder: UnlabelledFolder | None = None
) -> dict[str, Any]:
    """Do as ``evaluate``, with a recipe that was checked already."""
    recipe = prepared.recipe
    if not weights_exist(weights, where="--student"):
        raise RecipeError(f"--student is {weights!r}: no such file; `raydfkd run` or `distill` writes it")
    if prepared.teacher is None:
        raise RecipeError(f"teacher.weights is {recipe.teacher.weights!r}: no such file; `raydfkd teach` makes it")
    network = saved_student(recipe, weights, where="--student")
    job = open_job(recipe, prepared.teacher)
    if folder is not None:
        return judge_by_pictures(recipe, prepared.teacher, network, folder)
    return judge_student(job, prepared.teacher, network, SetView(job), prepared.data, split=split)


def report_again(recipe: Recipe, *, png: Path | None = None) -> tuple[dict[str, Any], Path]:
    """Write the page of a finished run again, or, where no student was trained yet, pictures of its set.

    Returns the content of report.json, or little more than the number of images, and the page's path.

    Args:
        recipe: of the run.
        png: file to write the pictures to as well, all in one; a JPEG where it ends so.

    Raises:
        RecipeError: there is neither a report nor an image, or the report is damaged.
    """
    prepared = check(recipe, writes_set=False)
    if prepared.teacher is None:
        raise RecipeError(f"teacher.weights is {recipe.teacher.weights!r}: no such file; `raydfkd run` makes it")
    job = open_job(recipe, prepared.teacher)
    try:
        found = read_report(Path(recipe.run_dir))
    except ValueError as error:
        raise RecipeError(
            f"run_dir is {recipe.run_dir!r}: its report.json is damaged ({error}); `raydfkd run` makes it again, and "
            "takes images and student as they are"
        ) from None
    view, (_, curves) = SetView(job), metrics_of(job)
    if png is not None:
        pictures = gallery(view, job.recipe.classes, class_names(job.recipe, prepared.data))
        if pictures is not None:
            gallery_sheet(pictures, png)
    if found is not None:
        return found, write(job, found, view, curves, prepared)
    verified = verify(job, prepared.teacher, prepared.verifier, view, prepared.data)
    page = write_gallery(job, view, curves, prepared, verified)
    if page is None:
        raise RecipeError(
            f"run_dir is {recipe.run_dir!r}: there is neither a report nor an image; `raydfkd run` makes them"
        )
    return {"images": view.snapshot.images, "gallery": str(page)}, page


@contextlib.contextmanager
def listening(recipe: Recipe, console: Console | None, *others: Listener) -> Iterator[Events]:
    """Tell the metrics file, the console and ``others`` what happens; the recipe is in run_dir from the start."""
    folder = Path(recipe.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    Store(str(folder)).put("recipe.yaml", recipe.to_yaml().encode())
    with (
        MetricsLog(folder / METRICS, fresh=False) as metrics,
        Display(console or Console(quiet=True)) as display,
    ):
        yield Events(MetricsWriter(metrics), display, *others)


def _teacher(prepared: Prepared, events: Events) -> Teacher:
    """The teacher that was opened, or one that is taught now; says what the user should know of it."""
    notes, teacher = list(prepared.notes), prepared.teacher
    if teacher is None:
        teacher = teach(prepared.recipe, events, prepared.network, anew=False)
        notes += probe_teacher(teacher.module, prepared.recipe.teacher)
    for note in notes:
        events.say("note", note)
    if prepared.not_data_free is not None:
        events.say("note", f"not data-free: {prepared.not_data_free}")
    return teacher


def announce(job: Job, events: Events) -> None:
    """Say what will be done and what is done already."""
    recipe, done = job.recipe, job.snapshot()
    events.planned(
        Plan(
            job=job.digest,
            training=job.training_name,
            images=job.planned_images,
            units=len(job.units),
            images_before=done.images,
            units_before=len(done.commits),
            student_steps=recipe.distill.steps,
        )
    )
    images = f"{job.planned_images:,} images in {len(job.units)} units" if job.units else "images made as it learns"
    students = f"student of {count_parameters(_outline_of(recipe)):,} parameters"
    events.say("plan", f"{len(recipe.classes)} classes, {images}, {students}")
    if job.units and done.commits:
        events.say("plan", f"{len(done.commits)} of {len(job.units)} units are there already; resuming from them")


def student_of(recipe: Recipe, state: Mapping[str, Tensor]) -> nn.Module:
    """The student with the weights ``state``, on the CPU, in eval mode."""
    network = _outline_of(recipe)
    network.load_state_dict({key: value.cpu() for key, value in state.items()})
    return network.eval()


def saved_student(recipe: Recipe, weights: str | os.PathLike[str], *, where: str = "student") -> nn.Module:
    """The recipe's student with the weights of a file, on the CPU.

    Raises:
        RecipeError: they are of another network; ``where`` is the option that names them.
    """
    network = _outline_of(recipe)
    load_weights(network, str(weights), where=where)
    return network


def _outline_of(recipe: Recipe) -> nn.Module:
    return build_network(recipe.student, recipe.teacher, where="student", seed=0)


def student_path(recipe: Recipe) -> Path:
    """The file to which the student's weights are written."""
    return Path(recipe.run_dir) / "student.safetensors"


def save_student(job: Job, state: Mapping[str, Tensor]) -> Path:
    """Write student.safetensors with its recipe in the metadata."""
    path = student_path(job.recipe)
    metadata = {"recipe": json.dumps(job.recipe.shown()), "digest": job.student_digest, "raydfkd": __version__}
    Store(str(path.parent)).put(path.name, state_bytes(state, metadata))
    return path


def metrics_of(job: Job) -> tuple[RunStats, Curves]:
    """The totals of all sessions of the job and its curves, from a single look through its metrics."""
    stats = StatsReader(job=job.digest, training=job.training_name)
    curves = Curves(job.training_name)
    for event in read_metrics(Path(job.recipe.run_dir) / METRICS):
        stats.add(event)
        curves.add(event)
    return stats.stats(), curves


def report(
    job: Job,
    judged: Mapping[str, Any],
    view: SetView,
    outcome: SynthesisOutcome,
    stats: RunStats,
    *,
    command: str,
    prepared: Prepared,
) -> dict[str, Any]:
    """Put the report together; ``write`` saves it. Scripts rely on the keys.

    ``judged`` has those of ``judge_student`` and ``verify``.
    """
    snapshot = view.snapshot
    look = look_at_images(job, view)
    held_out = sum(commit.images for commit in snapshot.commits if commit.unit in job.held_out)
    return {
        **judged,
        "not_data_free": prepared.not_data_free,
        "intended_class": None if look is None else look.intended,
        "answered_classes": None if look is None else look.answered,
        "warnings": [
            *([] if look is None else look.warnings),
            *_not_verified(prepared),
            *skipped_line(judged["skipped_pictures"]),
            *unseen_images(stats.student_images, snapshot.images - held_out),
        ],
        "recipe": job.recipe.shown(),
        "seed": job.recipe.seed,
        "images": snapshot.images,
        "student_images": stats.student_images,
        "held_out_images": held_out,
        "images_per_second": round(stats.images_per_second, 3),
        "units": {
            "planned": len(job.units),
            "committed": len(snapshot.commits),
            "attempted": stats.attempted,
            "quarantined": len(outcome.given_up),
        },
        "failures": [
            {"unit": failure.unit, "attempt": failure.attempt, "error": failure.error} for failure in outcome.given_up
        ],
        "seconds": {
            "total": round(stats.seconds, 1),
            "synthesis": round(stats.synthesis_seconds, 1),
            "distillation": round(stats.distillation_seconds, 1),
        },
        "content_digest": snapshot.content_digest(),
        "recipe_digest": job.digest,
        "versions": versions(),
        "device": ", ".join(stats.devices) or None,
        "command": command,
    }


def _not_verified(prepared: Prepared) -> list[str]:
    return [] if prepared.not_verified is None else [prepared.not_verified]


def unseen_images(seen: int | None, there: int) -> list[str]:
    """The line on images that are for the student and that it has not seen; none where it has, or nobody knows."""
    if seen is None or seen >= there:
        return []
    return [
        f"the student's last steps were drawn from {seen:,} of the {there:,} images that are there for it now: the "
        "others came too late, or were not whole"
    ]


def write(job: Job, found: Mapping[str, Any], view: SetView, curves: Curves, prepared: Prepared) -> Path:
    """Write report.json and report.html, each of them whole or not at all; returns the page's path."""
    folder = Path(job.recipe.run_dir)
    pictures = _pictures(job, view, prepared)
    Store(str(folder)).put("report.json", report_json(found).encode())
    Store(str(folder)).put("report.html", report_page(found, curves=curves, gallery=pictures).encode())
    return folder / "report.html"


def _pictures(job: Job, view: SetView, prepared: Prepared) -> Gallery | None:
    """Pictures of the set with what teacher and verifier think of them; None where there is no image."""
    pictures = gallery(view, job.recipe.classes, class_names(job.recipe, prepared.data))
    return pictures and with_opinion(pictures, job.recipe, prepared.verifier)


def write_gallery(
    job: Job, view: SetView, curves: Curves, prepared: Prepared, verified: Mapping[str, Any]
) -> Path | None:
    """Write gallery.html, pictures of the set without a student; returns its path, None where there is no image."""
    pictures = _pictures(job, view, prepared)
    if pictures is None:
        return None
    folder = Path(job.recipe.run_dir)
    look = look_at_images(job, view)
    page = pictures_page(
        pictures,
        curves=curves,
        recipe=job.recipe.shown(),
        warnings=[*([] if look is None else look.warnings), *_not_verified(prepared)],
        not_data_free=prepared.not_data_free,
        verified=verified,
    )
    Store(str(folder)).put("gallery.html", page.encode())
    return folder / "gallery.html"
