"""A recipe for a teacher that was looked at, written as a page: each choice with its reason beside it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from raydfkd.config.load import load_recipe, page_data
from raydfkd.config.recipe import Recipe
from raydfkd.config.schema import ImageSpace, Precision, is_own
from raydfkd.devices import device_name
from raydfkd.networks.flops import forward_flops
from raydfkd.networks.generators import GENERATORS
from raydfkd.networks.scout import SMALL, Found
from raydfkd.runner.pace import Arithmetic, Sizes, Speed, fastest, in_words, sizes_for
from raydfkd.runner.small_students import Kind, kind_for, largest_within

MOST_WORK, LEAST_WIDTH = 1.5, 8
"""Work of a generator for an image, in that of the teacher, and the width below which it is not made narrower."""
UNEVEN = {"kind": "soft_kl", "temperature": 2, "standardised": "teacher"}
"""Criterion for teachers without BatchNorm, whose logits are many times larger in some images than in others."""
TRIAL = Sizes(batches_per_unit=1, units_per_class=2, student_steps=20, workers=1, executor="local", rounds=2)


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A recipe in the making."""

    found: Found
    name: str
    student: Mapping[str, Any]
    """The section ``student``; empty for a small network that is chosen here."""
    data: str | None
    """Folder of labelled pictures that judge."""
    command: str
    """What the user has typed."""
    is_hurried: bool = False
    """Whether the student is to learn in few steps."""

    def page(self, budget: float) -> str:
        """The commented recipe for a budget of seconds on this machine, on which a few steps of it are made.

        Raises:
            RecipeError: the teacher cannot be opened or inverted, or the budget has no room for a unit of each class.
        """
        fit = self.fit(budget)
        return fit.draft._text(fit.sizes, fit.arithmetic, [*self._speed(fit.speed, budget)])

    def fit(self, budget: float, *, by_clock: bool = False) -> Fit:
        """What of a recipe depends on the machine, measured by a few steps.

        Args:
            budget: seconds on this machine.
            by_clock: whether the run, of one process, ends with its budget whatever it has made; none is too short.

        Raises:
            RecipeError: the teacher cannot be opened or inverted, or the budget has no room for a unit of each class.
        """
        arithmetic, speed = fastest(lambda arithmetic: recipe_of(self.page_of(TRIAL, arithmetic)))
        groups = -(-self._classes // self._classes_per_unit)
        sizes = sizes_for(budget, speed, groups=groups, rounds=self._rounds, by_clock=by_clock)
        if not self.student and sizes.student_steps < self._kind.least_steps:
            return replace(self, is_hurried=True).fit(budget, by_clock=by_clock)
        return Fit(draft=self, arithmetic=arithmetic, speed=speed, sizes=sizes)

    def page_of(self, sizes: Sizes, arithmetic: Arithmetic) -> str:
        """The commented recipe with those numbers of images, steps and rounds, whatever they take."""
        return self._text(sizes, arithmetic, [])

    @property
    def method(self) -> str:
        """The packaged method that layers and size of images suggest."""
        if self.found.is_small and all(edge % 4 == 0 for edge in self.found.edges):
            return "nayer" if self.found.has_moments else "nayer_procedural"
        return "deepinversion" if self.found.has_moments else "deepdream"

    @property
    def _classes(self) -> int:
        return int(self.found.section["classes"])

    @property
    def _is_generator(self) -> bool:
        return bool(self._synthesis_of_method["synthesizer"] == "generator")

    @property
    def _synthesis_of_method(self) -> Mapping[str, Any]:
        return dict(page_data(self.method)["synthesis"])

    @property
    def _rounds(self) -> int:
        """Rounds of the method."""
        return int(page_data(self.method).get("rounds", 1))

    @property
    def _classes_per_unit(self) -> int:
        """All of them where a batch has room: a run by the clock can then end after any batch."""
        return min(self._classes, 100 if self.found.is_small else 20)

    @property
    def _batch_per_class(self) -> int:
        """Images of each class in a batch of about a hundred, or twenty where they are large."""
        return max(1, (100 if self.found.is_small else 20) // self._classes_per_unit)

    def _text(self, sizes: Sizes, arithmetic: Arithmetic, speed: list[str]) -> str:
        sections = (
            self._head(speed),
            self._teacher(),
            self._student(),
            self._synthesis(arithmetic.synthesis),
            self._numbers(sizes, arithmetic.student),
        )
        return "\n".join(line for section in sections for line in section) + "\n"

    def _head(self, speed: list[str]) -> Iterator[str]:
        norms = ", ".join(f"{count} {name}" for name, count in sorted(self.found.norms.items())) or "none"
        yield f"# Written by `{self.command}`; change what you know better."
        yield "#"
        yield f"#   raydfkd check {self.name}.yaml"
        yield f"#   raydfkd run {self.name}.yaml"
        yield "#"
        yield f"# Teacher: {self.found.parameters:,} weights{', attention' if self.found.has_attention else ''}."
        yield f"# Normalisation layers: {norms}; {self.found.statistics} of them stored statistics of the training."
        yield from speed
        yield "# Nothing here was tuned on this teacher: look at the pictures, and judge on real ones."
        yield f"recipe: {self.method}   # {self._why}; others: raydfkd show --for {self.name}.yaml"
        yield f"name: {self.name}"

    def _speed(self, speed: Speed, budget: float) -> Iterator[str]:
        batch = self._batch_per_class * self._classes_per_unit
        yield (
            f"# On this machine ({device_name(speed.device)}) a step of synthesis with {batch} images takes "
            f"{_milli(speed.synthesis)},"
        )
        yield f"# one of the student {_milli(speed.student)}; {speed.peak_mib:,} MiB of memory were in use at most."
        yield f"# Images and steps are what about {in_words(budget)} have room for."

    @property
    def _why(self) -> str:
        moments = "statistics of BatchNorm" if self.found.has_moments else "no statistics of BatchNorm"
        if self._is_generator:
            return f"{moments}, small images"
        return f"{moments}, {'an edge not divisible by 4' if self.found.is_small else f'images over {SMALL} pixels'}"

    def _teacher(self) -> Iterator[str]:
        section, sources = self.found.section, self.found.sources
        yield "teacher:"
        yield from _entry("network", section["network"])
        for key in ("options", "allow_code", "output"):
            if section.get(key):
                yield from _entry(key, section[key])
        yield from _entry(
            "weights", section["weights"], "those that it comes with" if is_own(section["weights"]) else None
        )
        yield from _entry("classes", section["classes"], sources.get("classes"))
        if section.get("class_names"):
            yield from _entry("class_names", section["class_names"])
        if "temperature" in section:
            yield from _entry("temperature", section["temperature"], sources.get("temperature"))
        yield "  image_space:"
        for key in ("channels", "size", "mean", "std"):
            yield from _entry(key, self.found.space[key], sources.get(key), indent=4)

    def _student(self) -> Iterator[str]:
        student = self.student or self._small_student
        yield "student:"
        yield from _entry("network", student["network"], None if self.student else self._kind.why)
        if student.get("options"):
            yield from _entry("options", student["options"])
        if self.data is None:
            yield "real_data: null   # an estimate judges; or pictures of yours, {kind: image_folder, root: ...}"
        else:
            yield f"real_data: {_flow({'kind': 'image_folder', 'root': self.data})}   # judges, and nothing else"

    @cached_property
    def _kind(self) -> Kind:
        """Of the student, where the user has named none."""
        return kind_for(self.found, is_hurried=self.is_hurried)

    @cached_property
    def _small_student(self) -> Mapping[str, Any]:
        return largest_within(self._kind, self.found)

    def _synthesis(self, precision: Precision) -> Iterator[str]:
        jitter = max(1, round(min(self.found.edges) / 16))
        yield "synthesis:"
        if precision != "float32":
            yield from _entry("precision", precision, "faster than float32 on this machine")
        yield from _entry("augment", [{"kind": "jitter", "pixels": jitter}], "a sixteenth of the image")
        if self._is_generator:
            yield from _entry("batch_per_class", self._batch_per_class)
            width, usual = self._generator_width, self._synthesis_of_method["generator"]["width"]
            if width != usual:
                yield from _entry("generator", {"width": width}, f"one of {usual} would do more work than the teacher")
            return
        yield from _entry("batch_size", self._batch_per_class * self._classes_per_unit)
        stages = self._synthesis_of_method["stages"]
        if len(stages) > 1 and (self.found.fixed_size or any(edge % 2 for edge in self.found.edges)):
            steps = sum(stage["steps"] for stage in stages)
            yield from _entry(
                "stages", [{"steps": steps}], "the network takes no images of half the size to begin with"
            )

    @cached_property
    def _generator_width(self) -> int:
        """The method's, halved until the generator does little more work for an image than the teacher does."""
        spec = {**self._synthesis_of_method["generator"]}
        kind, width = spec.pop("kind"), spec.pop("width")
        space, most = ImageSpace.model_validate_json(json.dumps(self.found.space)), MOST_WORK * self.found.flops()
        while width > LEAST_WIDTH:
            options = {**spec, "width": width}
            generator = GENERATORS.build(kind, options, space, where="synthesis.generator")
            if forward_flops(generator, (spec["latent"],)) <= most:
                break
            width //= 2
        return int(width)

    def _numbers(self, sizes: Sizes, precision: Precision) -> Iterator[str]:
        beside = sum(part.get("images", 1) for part in self._synthesis_of_method.get("beside", ()))
        per_unit = round(sizes.batches_per_unit * self._batch_per_class * (1 + beside))
        per_class = sizes.units_per_class * per_unit
        yield "transfer_set:"
        yield from _entry("images_per_class", per_class)
        unit = {"classes": self._classes_per_unit, "images_per_class": per_unit}
        yield from _entry("unit", unit, "what a worker makes at a time")
        if self._rounds > 1:
            yield f"rounds: {sizes.rounds}   # of synthesis and training, each against the student of the one before"
        yield "distill:"
        yield from _entry("steps", sizes.student_steps)
        if precision != "float32":
            yield from _entry("precision", precision)
        if self.found.is_small and self.data is None:
            yield from _entry("holdout", 0, "of the images; the estimate needs none")
        if self.found.is_small and not self.found.has_moments:
            yield from _entry("criterion", UNEVEN, "its answers to such images differ in size more than in kind")
        if ":" in str(self.student.get("network", "")):
            yield from _entry("optimizer", {"kind": "adam", "lr": 1e-3}, "lower than the method's, for larger networks")
        wait = min(per_class, 2 * per_unit) * self._classes
        yield from _entry("source", {"kind": "growing", "wait_for": wait, "complete_by": 0.5}, "starts with that many")
        yield "runtime:"
        where = "a cluster of this machine's processes, or one that runs" if sizes.executor == "ray" else "this process"
        yield from _entry("executor", sizes.executor, where)
        if sizes.executor == "ray":
            yield from _entry("workers", {"max": sizes.workers}, "and a core or GPU for the student")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A recipe for a budget of seconds on this machine."""

    draft: Draft
    """With the student for which there is time."""
    arithmetic: Arithmetic
    """That is fastest here."""
    speed: Speed
    sizes: Sizes


def recipe_of(page: str) -> Recipe:
    """The recipe that a page of YAML is.

    Raises:
        RecipeError: it is none.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(page, encoding="utf-8")
        return load_recipe(path)


def _entry(key: str, value: Any, comment: str | None = None, *, indent: int = 2) -> Iterator[str]:
    """A line of the page; a long one has its comment above it."""
    line = f"{' ' * indent}{key}: {_flow(value)}"
    is_short = comment is None or len(line) + len(comment) <= 112
    if not is_short:
        yield f"{' ' * indent}# {key} is {comment}"
    yield f"{line}   # {comment}" if comment and is_short else line


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return text.removesuffix("...\n").strip()


def _milli(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
