"""The report of a run for people: report.json, report.html and pictures of the transfer set."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from rich.table import Table
from torch import Tensor

from raydfkd.report.charts import Curves, heat_map
from raydfkd.report.metrics import JSON, finite

NOT_JUDGED = "not judged (no real data)"
MAX_CLASSES = 20
MAX_FAILURES = 50
MAX_JUDGED = 20
"""Classes up to which all are in the table; of more the worst ones."""
WORST = 10
MAX_PICTURE_BYTES = 3_000_000
FIGURES = {"top5": "top-5", "ece": "calibration error"}
"""Figures beside top-1 that a network may have, and what they are called."""
NEWER_KEYS: Mapping[str, JSON] = {
    "judged_images": None,
    "student_images": None,
    "held_out_images": 0,
    "intended_class": None,
    "answered_classes": None,
    "warnings": (),
    "class_names": None,
    "images_per_class": None,
    "confusion": None,
    "skipped_pictures": {"count": 0, "first": ()},
    "not_data_free": None,
    "verifier": None,
    "moment_distance": None,
}
"""Keys of report.json that earlier versions did not write, and the values that are read instead."""
_NEWER_FIGURES: Mapping[str, JSON] = {"top5": None, "ece": None, "per_class": None}
"""The same of the figures of teacher and student."""
_FOUND = {
    "intended": "put in the intended class",
    "teacher's answer": "put in the class that the teacher finds",
    "intended or teacher's answer": "put in the intended class, or in the one that the teacher finds where none was",
}
"""What a verifier's figures are the share of, by the ``of`` of report.json."""
_ALWAYS = frozenset({"agreement", "images", "judged_on", "recipe", "seconds", "student", "teacher", "units"})
"""Keys without which a file is no report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where an image is in its transfer set."""

    unit: str
    seed: int
    """Of the unit."""
    index: int
    """Number of the image in its unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gallery:
    """Some images of each class, with the teacher's confidence in them."""

    images: Tensor
    """uint8 [K, M, C, H, W]: a row of M images for each of K classes."""
    class_names: tuple[str, ...]
    """Names of the K classes."""
    teacher_confidence: Tensor
    """[K, M]: probability that the teacher gives the intended class; NaN where a class has no more images."""
    origins: tuple[tuple[Origin | None, ...], ...]
    """Where each of the K x M images is in the set; None where a class has no more images."""
    classes: tuple[int, ...] = ()
    """Numbers of the K classes, for those who ask a network about the images."""
    verifier_confidence: Tensor | None = None
    """[K, M]: the same probability as another network sees it; None where there is none."""
    of_classes: int = 0
    """Classes from which these were chosen, evenly spaced; 0 where these are all."""

    def __post_init__(self) -> None:
        assert self.images.dtype == torch.uint8, "a gallery shows bytes"
        assert self.images.shape[:2] == self.teacher_confidence.shape, "each image has its confidence"
        assert len(self.images) == len(self.class_names), "each row has its name"
        assert [len(row) for row in self.origins] == [self.images.shape[1]] * len(self.images), (
            "each image has its unit"
        )


def report_json(report: Mapping[str, JSON]) -> str:
    """The content of ``report.json``."""
    return json.dumps(_plain(report), indent=2, allow_nan=False) + "\n"


def report_page(report: Mapping[str, JSON], *, curves: Curves, gallery: Gallery | None) -> str:
    """The self-contained ``report.html``."""
    data = _plain(report)
    return _rendered(
        "page.html",
        report=data,
        difference=_difference(data["teacher"]["top1"], data["student"]["top1"]),
        judged=_judged(data),
        figures=FIGURES,
        student_curves=curves.student(),
        objective_curves=curves.objective(),
        gallery=None if gallery is None else _gallery_rows(gallery),
        recipe_yaml=_yaml(data["recipe"]),
        max_failures=MAX_FAILURES,
    )


def pictures_page(
    gallery: Gallery,
    *,
    curves: Curves,
    recipe: Mapping[str, Any],
    warnings: Sequence[str],
    not_data_free: str | None = None,
    verified: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """The self-contained ``gallery.html``: the images of a set that no student was trained on yet.

    ``verified`` has the keys ``verifier`` and ``moment_distance`` of report.json.
    """
    return _rendered(
        "pictures.html",
        gallery=_gallery_rows(gallery),
        objective_curves=curves.objective(),
        recipe=recipe,
        recipe_yaml=_yaml(recipe),
        warnings=warnings,
        not_data_free=not_data_free,
        verified={key: finite(verified.get(key)) for key in ("verifier", "moment_distance")},
    )


def read_report(run_dir: Path) -> dict[str, Any] | None:
    """The content of ``report.json``, also of an earlier version; None where there is no such file.

    Raises:
        ValueError: the file is cut off, damaged or no report.
    """
    path = run_dir / "report.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_bytes())
    missing = _ALWAYS - found.keys() if isinstance(found, dict) else _ALWAYS
    if missing:
        raise ValueError(f"there is no {', '.join(sorted(missing))} in it")
    return _plain(found)


def _rendered(template: str, **values: Any) -> str:
    return _pages().get_template(template).render(**values)


@cache
def _pages() -> Environment:
    """The templates, each compiled once."""
    pages = Environment(
        loader=PackageLoader("raydfkd.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update(percent=percent, count=count, duration=duration, estimated=estimated, found=_FOUND.get)
    return pages


def _yaml(data: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True)
    return text


def summary_table(report: Mapping[str, JSON]) -> Table:
    """The result in a terminal: teacher and student side by side."""
    data = _plain(report)
    images = f"{count(data['judged_images'])} " if data["judged_images"] is not None else ""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("teacher", justify="right")
    table.add_column("student", justify="right")
    if data["verifier"] is not None:
        table.add_column("verifier", justify="right")
    if data["student"]["top1"] is not None:
        table.add_row(str(data["judged_on"]), percent(data["teacher"]["top1"]), percent(data["student"]["top1"]))
    estimate = data["student"]["estimate"]
    if estimate is not None:
        table.add_row("agreement on real images, estimated", "-", estimated(estimate))
    if data["agreement"] is not None:
        table.add_row(f"agreement on {images}{data['judged_on']}", "-", percent(data["agreement"]))
    for row in [] if data["verifier"] is None else _rows_of_verifier(data["verifier"], data["intended_class"]):
        table.add_row(*row)
    return table


def _rows_of_verifier(verifier: Mapping[str, Any], intended: float | None) -> Iterator[tuple[str, str, str, str]]:
    """Cells about the images: of teacher, student and verifier."""
    what = f"{count(verifier['images'])} synthetic images {_FOUND[verifier['of']]}"
    yield what, "-" if intended is None else percent(intended), "-", percent(verifier["top1"])
    if verifier["real"] is not None:
        real = verifier["real"]
        yield f"{count(real['images'])} real images put in theirs", "-", "-", percent(real["top1"])


def verified_words(verified: Mapping[str, Any]) -> dict[str, str]:
    """What ``verifier`` and ``moment_distance`` of report.json say, in a line each; none of what is not there."""
    words, verifier, moments = {}, verified["verifier"], verified["moment_distance"]
    if verifier is not None:
        top5 = "" if verifier["top5"] is None else f", {percent(verifier['top5'])} among the five likeliest"
        real = "" if verifier["real"] is None else f"; of real ones {percent(verifier['real']['top1'])}"
        words["verifier"] = (
            f"{verifier['network']}: {percent(verifier['top1'])} of {count(verifier['images'])} images "
            f"{_FOUND[verifier['of']]}{top5}{real}"
        )
    if moments is not None:
        there = [f"{kind} {count(value)}" for kind, value in moments.items() if value is not None]
        words["moment_distance"] = ", ".join(there)
    return words


def estimated(estimate: Mapping[str, Any]) -> str:
    """An estimate with its interval, or that it is unknown."""
    if estimate["agreement"] is None:
        return "unknown"
    agreement, low, high = (round(100 * estimate[key]) for key in ("agreement", "low", "high"))
    return f"{agreement} % ({low} to {high})"


def _judged(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was judged class by class, as the page shows it; None where there were no labels."""
    names, images, confusion = data["class_names"], data["images_per_class"], data["confusion"]
    if names is None or images is None or confusion is None:
        return None
    per_class = {role: data[role]["per_class"] for role in ("teacher", "student")}
    seen = [label for label in range(len(names)) if images[label]]
    worst = sorted(seen, key=lambda label: (per_class["student"][label], label))
    shown = seen if len(seen) <= MAX_JUDGED else worst[:WORST]
    matrix = confusion["student"].get("matrix")
    return {
        "rows": [
            {"name": names[label], "images": images[label], **{role: per_class[role][label] for role in per_class}}
            for label in shown
        ],
        "num_seen": len(seen),
        "num_classes": len(names),
        "map": None if matrix is None else heat_map(matrix, names),
        "mistakes": [
            {"name": names[label], "answer": names[answer], "count": count, "share": count / images[label]}
            for label, answer, count in _mistakes(confusion["student"])[:WORST]
        ],
    }


def _mistakes(confusion: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """Class, answer and images of each mistake, the most frequent first."""
    if "pairs" in confusion:
        return [(label, answer, number) for label, answer, number in confusion["pairs"]]
    found = [
        (label, answer, number)
        for label, row in enumerate(confusion["matrix"])
        for answer, number in enumerate(row)
        if number and label != answer
    ]
    return sorted(found, key=lambda mistake: (-mistake[2], mistake))


def percent(fraction: float | None) -> str:
    """``0.991`` as ``99.1 %``; without a value, why there is none."""
    return NOT_JUDGED if fraction is None else f"{fraction:.1%}".replace("%", "\N{NO-BREAK SPACE}%")


def count(number: float | None) -> str:
    """``6000`` as ``6,000``, to three digits below a hundred; a dash without a value."""
    if number is None:
        return "–"
    return f"{number:,.0f}" if abs(number) >= 100 or number == int(number) else f"{number:.3g}"


def duration(seconds: float | None) -> str:
    """``108.2`` as ``1 min 48 s``; a dash without a value."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        text = f"{hours} h {minutes} min"
    elif minutes:
        text = f"{minutes} min {rest} s"
    else:
        text = f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _difference(teacher: float | None, student: float | None) -> str:
    if teacher is None or student is None:
        return ""
    points = round(100 * (student - teacher), 1)
    if points == 0:
        return "level with the teacher"
    return f"{abs(points):.1f} points {'above' if points > 0 else 'below'} the teacher"


def _gallery_rows(gallery: Gallery) -> dict[str, Any]:
    """The part of a gallery that the page shows: evenly spaced classes, as many columns as its weight allows."""
    num_rows, num_columns, _, height, width = gallery.images.shape
    chosen = evenly_spaced(num_rows, MAX_CLASSES)
    rows: list[dict[str, Any]] = [{"name": gallery.class_names[index], "pictures": []} for index in chosen]
    total_bytes = shown = 0
    for column in range(num_columns):
        pictures = [_data_uri(image) for image in showable(gallery.images[chosen, column])]
        total_bytes += sum(map(len, pictures))
        if column and total_bytes > MAX_PICTURE_BYTES:
            break
        for row, index, uri in zip(rows, chosen, pictures, strict=True):
            confidence = float(gallery.teacher_confidence[index, column])
            if not math.isnan(confidence):
                origin, seen = gallery.origins[index][column], gallery.verifier_confidence
                verifier = None if seen is None else float(seen[index, column])
                row["pictures"].append({"uri": uri, "confidence": confidence, "verifier": verifier, "origin": origin})
        shown = column + 1
    side = max(height, width)
    return {
        "rows": rows,
        "num_classes": max(num_rows, gallery.of_classes),
        "is_sampled": max(num_rows, gallery.of_classes) > MAX_CLASSES,
        "shown": shown,
        "num_columns": num_columns,
        "height": height,
        "width": width,
        "display": side * max(1, round(64 / side)) if side <= 96 else 112,
    }


def evenly_spaced(count: int, most: int) -> list[int]:
    """Some of the numbers below ``count``, the first and the last included, ``most`` of them or all."""
    chosen: list[int] = np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()
    return chosen


def showable(images: Tensor) -> Tensor:
    """Images [..., C, H, W] with one or three channels; any other number becomes grey."""
    if images.shape[-3] in (1, 3):
        return images
    return images.float().mean(-3, keepdim=True).round().byte()


def _data_uri(image: Tensor) -> str:
    """PNG where single pixels are to be seen; JPEG for large images, whose noise would make PNGs of megabytes."""
    kind = "png" if max(image.shape) <= 96 else "jpeg"
    buffer = io.BytesIO()
    picture(image).save(buffer, kind, quality=90)  # PNG ignores the quality
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def picture(image: Tensor) -> Image.Image:
    """A uint8 image [C, H, W] of one or three channels as Pillow has it."""
    rows = image.cpu().permute(1, 2, 0).numpy()
    return Image.fromarray(rows[..., 0] if len(image) == 1 else rows)


def _plain(report: Mapping[str, JSON]) -> dict[str, Any]:
    """The report as a reader of ``report.json`` gets it."""
    data: dict[str, Any] = json.loads(json.dumps(finite({**NEWER_KEYS, **report})))
    for role in ("teacher", "student"):
        data[role] = {**_NEWER_FIGURES, **data[role]}
    data["student"].setdefault("estimate", None)
    return data
