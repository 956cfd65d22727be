"""What a run leaves for people: metrics as it goes, then report.json, report.html and pictures of the transfer set."""

from __future__ import annotations

import base64
import importlib.resources
import io
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import yaml
from jinja2 import Environment, StrictUndefined
from PIL import Image
from rich.table import Table
from torch import Tensor
from torchvision.utils import make_grid

JSON: TypeAlias = "None | bool | int | float | str | Sequence[JSON] | Mapping[str, JSON]"

NOT_JUDGED = "not judged (no real data)"
MAX_CLASSES = 20
MAX_FAILURES = 50
MAX_PICTURE_BYTES = 3_000_000
MAX_POINTS = 200


class MetricsLog:
    """``metrics.jsonl`` of a run: one JSON object a line, only ever appended to.

    Any thread may write, and a line is out of this process when ``write`` returns. Non-finite numbers become null, so
    that every line is JSON for every reader.
    """

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self._path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb" if fresh else "a+b") as file:
            if not fresh:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)  # the next line must not continue a torn one

    def write(self, event: str, **values: JSON) -> None:
        """Append one event with the time in seconds since the epoch."""
        line = json.dumps(_finite({"event": event, "time": time.time(), **values}), allow_nan=False) + "\n"
        with self._lock, self._path.open("a", encoding="ascii") as file:
            file.write(line)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every event of a metrics file, without the last line where a killed process left it torn."""
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gallery:
    """Some images of each class, with what the teacher thinks of them."""

    images: Tensor
    """uint8 [K, M, C, H, W]: a row of M images for each of K classes."""
    class_names: tuple[str, ...]
    """Names of the K classes."""
    teacher_confidence: Tensor
    """[K, M]: probability that the teacher gives the intended class."""

    def __post_init__(self) -> None:
        assert self.images.dtype == torch.uint8, "a gallery shows bytes"
        assert self.images.shape[:2] == self.teacher_confidence.shape, "each image has its confidence"
        assert len(self.images) == len(self.class_names), "each row has its name"


def write_report(
    run_dir: Path,
    report: Mapping[str, JSON],
    *,
    metrics: Sequence[Mapping[str, Any]],
    gallery: Gallery | None,
) -> None:
    """Write ``report.json`` and the self-contained ``report.html``, each of them whole or not at all."""
    data = _plain(report)
    run_dir.mkdir(parents=True, exist_ok=True)
    _replace(run_dir / "report.json", json.dumps(data, indent=2, allow_nan=False) + "\n")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters.update(percent=percent, count=count, duration=duration)
    template = (importlib.resources.files("raydfkd") / "report_page.html").read_text(encoding="utf-8")
    html = page.from_string(template).render(
        report=data,
        difference=_difference(data["teacher"]["top1"], data["student"]["top1"]),
        student_curves=_student_curves(metrics),
        objective_curves=_objective_curves(metrics),
        gallery=None if gallery is None else _gallery_rows(gallery),
        recipe_yaml=yaml.safe_dump(data["recipe"], sort_keys=False, allow_unicode=True),
        max_failures=MAX_FAILURES,
    )
    _replace(run_dir / "report.html", html)


def summary_table(report: Mapping[str, JSON]) -> Table:
    """The result in a terminal: teacher and student side by side."""
    data = _plain(report)
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("teacher", justify="right")
    table.add_column("student", justify="right")
    table.add_row("real test images", percent(data["teacher"]["top1"]), percent(data["student"]["top1"]))
    table.add_row("agreement with teacher", "-", percent(data["agreement"]))
    return table


def gallery_png(gallery: Gallery, path: Path, scale: int = 2) -> None:
    """Write all images as one PNG, a row for each class, every pixel ``scale`` pixels wide and high."""
    images = _showable(gallery.images)
    large = images.repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)
    sheet = make_grid(large.flatten(0, 1), nrow=images.shape[1], padding=scale, pad_value=255)
    _picture(sheet).save(path, "PNG")


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
    """What the page shows of a gallery: evenly spaced classes, as many columns as its weight allows."""
    num_classes, num_columns, _, height, width = gallery.images.shape
    chosen = np.linspace(0, num_classes - 1, min(num_classes, MAX_CLASSES)).round().astype(int).tolist()
    rows: list[dict[str, Any]] = [{"name": gallery.class_names[index], "pictures": []} for index in chosen]
    total_bytes = shown = 0
    for column in range(num_columns):
        pictures = [_data_uri(image) for image in _showable(gallery.images[chosen, column])]
        total_bytes += sum(map(len, pictures))
        if column and total_bytes > MAX_PICTURE_BYTES:
            break
        for row, index, uri in zip(rows, chosen, pictures, strict=True):
            row["pictures"].append({"uri": uri, "confidence": float(gallery.teacher_confidence[index, column])})
        shown = column + 1
    side = max(height, width)
    return {
        "rows": rows,
        "num_classes": num_classes,
        "shown": shown,
        "num_columns": num_columns,
        "height": height,
        "width": width,
        "display": side * max(1, round(64 / side)) if side <= 96 else 112,
    }


def _showable(images: Tensor) -> Tensor:
    """Images [..., C, H, W] with one or three channels; any other number becomes grey."""
    if images.shape[-3] in (1, 3):
        return images
    return images.float().mean(-3, keepdim=True).round().byte()


def _data_uri(image: Tensor) -> str:
    """PNG where single pixels are to be seen; JPEG for large images, whose noise would make PNGs of megabytes."""
    kind = "png" if max(image.shape) <= 96 else "jpeg"
    buffer = io.BytesIO()
    _picture(image).save(buffer, kind, quality=90)  # PNG ignores the quality
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _picture(image: Tensor) -> Image.Image:
    rows = image.cpu().permute(1, 2, 0).numpy()
    return Image.fromarray(rows[..., 0] if len(image) == 1 else rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chart:
    """A curve over steps, ready to draw in a box of ``SIZE`` whose origin is the upper left corner."""

    title: str
    first: str
    last: str
    log: bool
    line: str
    band: str
    end: tuple[float, float]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


_LEFT, _RIGHT, _TOP, _BOTTOM = 42.0, 310.0, 8.0, 138.0


def _student_curves(metrics: Sequence[Mapping[str, Any]]) -> list[_Chart]:
    # a student that resumes from a checkpoint repeats steps: the last word on a step counts
    by_step = {event["step"]: event for event in metrics if event["event"] == "student"}
    steps = _thin(sorted(by_step))
    charts = []
    for key, title, form in (
        ("loss", "loss", _short),
        ("agreement", "agreement with teacher", lambda value: f"{100 * value:.3g} %"),
        ("snapshot_images", "images in the snapshot it reads", _short),
    ):
        values = [(step, by_step[step].get(key)) for step in steps]
        charts += _chart(title, [(step, value, value, value) for step, value in values if value is not None], form)
    return charts


def _objective_curves(metrics: Sequence[Mapping[str, Any]]) -> list[_Chart]:
    latest = {(event["step"], event["unit"]): event for event in metrics if event["event"] == "objective"}
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for (step, _), event in latest.items():
        by_step.setdefault(step, []).append(event)
    steps = _thin(sorted(by_step))
    keys = dict.fromkeys(key for step in steps for event in by_step[step] for key in event)
    charts = []
    for key in keys:
        if key in ("event", "time", "unit", "step", "attempt"):
            continue
        points = []
        for step in steps:
            values = [event[key] for event in by_step[step] if event.get(key) is not None]
            if values:
                low, middle, high = np.percentile(values, (25, 50, 75)).tolist()
                points.append((step, low, middle, high))
        charts += _chart(key, points, _short)
    return charts


def _chart(title: str, points: Sequence[tuple[int, float, float, float]], form: Callable[[float], str]) -> list[_Chart]:
    """The curve of (step, low, middle, high), or nothing where there are no points."""
    if not points:
        return []
    low, high = min(point[1] for point in points), max(point[3] for point in points)
    log = low > 0 and high / low >= 100
    place_x, x_ticks = _axis(points[0][0], points[-1][0], _LEFT, _RIGHT, log=False, tight=True)
    place_y, y_ticks = _axis(low, high, _BOTTOM, _TOP, log=log, tight=False)
    line = [(place_x(step), place_y(middle)) for step, _, middle, _ in points]
    above = [(place_x(step), place_y(upper)) for step, _, _, upper in points]
    below = [(place_x(step), place_y(lower)) for step, lower, _, _ in reversed(points)]
    chart = _Chart(
        title=title,
        first=form(points[0][2]),
        last=form(points[-1][2]),
        log=log,
        line=_coordinates(line),
        band="" if above == below[::-1] else _coordinates(above + below),
        end=line[-1],
        x_ticks=[(place_x(tick), _short(tick)) for tick in x_ticks],
        y_ticks=[(place_y(tick), form(tick)) for tick in y_ticks],
    )
    return [chart]


def _axis(
    low: float, high: float, start: float, end: float, *, log: bool, tight: bool
) -> tuple[Callable[[float], float], list[float]]:
    """Where a value lies between ``start`` and ``end``, and round values to mark; a tight axis ends with the data."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        first, last = decades[0], decades[-1]
        marked = decades[:: math.ceil(len(decades) / 5)]
        return lambda value: start + (end - start) * (math.log10(value) - first) / (last - first), [
            10.0**decade for decade in marked
        ]
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    magnitude = 10 ** math.floor(math.log10((high - low) / 4))
    step = magnitude * next(factor for factor in (1, 2, 5, 10) if magnitude * factor >= (high - low) / 4)
    ticks = [index * step for index in range(math.floor(low / step), math.ceil(high / step) + 1)]
    if tight:
        ticks = [tick for tick in ticks if low <= tick <= high]
    else:
        low, high = ticks[0], ticks[-1]
    return lambda value: start + (end - start) * (value - low) / (high - low), ticks


def _thin(steps: list[int]) -> list[int]:
    """At most ``MAX_POINTS`` of them, the first and the last included: more cannot be seen."""
    indices = np.linspace(0, len(steps) - 1, min(len(steps), MAX_POINTS)).round().astype(int)
    return [steps[index] for index in indices]


def _coordinates(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _plain(report: Mapping[str, JSON]) -> dict[str, Any]:
    """The report as a reader of ``report.json`` gets it."""
    data: dict[str, Any] = json.loads(json.dumps(_finite(report)))
    return data


def _finite(value: JSON) -> JSON:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(inner) for inner in value]
    return value


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
