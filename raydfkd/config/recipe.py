"""The recipe: everything a run depends on, as frozen data with a digest of what affects pixels."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import model_validator

from raydfkd.config.schema import (
    BudgetSpec,
    DistillSpec,
    ImageSpace,
    Positive,
    RealDataSet,
    RuntimeSpec,
    Spec,
    StudentSpec,
    SynthesisSpec,
    TeacherSpec,
    Text,
    TransferSetSpec,
    VerifierSpec,
    is_file,
)
from raydfkd.errors import RecipeError, read_text
from raydfkd.report.redaction import redacted_data
from raydfkd.units import Phase, WorkUnit, plan_phases, plan_units


class Recipe(Spec):
    """A whole run, as data."""

    name: str
    """Names the run; letters, digits, dash, dot and underscore."""
    seed: int = 0
    """Every other seed derives from this one."""
    run_dir: Text = "runs/${name}"
    """Folder of reports, student and checkpoints."""
    teacher: TeacherSpec
    """The network to invert."""
    student: StudentSpec
    """The network to train."""
    real_data: RealDataSet | None = None
    """Real images that train the teacher where it has to be trained, and judge the student; nothing else reads them."""
    verifier: VerifierSpec | None = None
    """Another trained network over the same classes, which says whether the images are good for more than the teacher
    that made them; no part of their making."""
    synthesis: SynthesisSpec
    """The making of the images: synthesizer, objective, labels."""
    rounds: Positive = 1
    """Rounds of synthesis and training one after the other: from the second on, images are made against the student
    that the rounds before have trained."""
    transfer_set: TransferSetSpec
    """The store that the images go to, and their number."""
    distill: DistillSpec
    """The training of the student."""
    runtime: RuntimeSpec = RuntimeSpec()
    """The workers and devices that do the work."""
    budget: BudgetSpec = BudgetSpec()
    """The shares of a budget that `raydfkd bench quality` gives to synthesis and training."""

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        mistakes = [
            *self._mistakes_in_names(),
            *self._mistakes_in_images(),
            *self._mistakes_in_verifier(),
            *self._mistakes_in_numbers(),
            *self._mistakes_in_workers(),
        ]
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    def _mistakes_in_names(self) -> Iterator[str]:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            yield f"name is {self.name!r}; use letters, digits, dash, dot and underscore"
        if "://" in self.run_dir:
            yield f"run_dir is {self.run_dir!r}; it must be a folder, only transfer_set.uri may be a URL"
        if self.teacher.train is not None and self.real_data is None:
            yield "teacher.train needs real_data; say which, or drop train and give weights"

    def _mistakes_in_images(self) -> Iterator[str]:
        made, space = self.made_space, self.teacher.image_space
        if made.height > space.height or made.width > space.width:
            yield (
                f"synthesis.size is {made.size_text}, more than the teacher's {space.size_text}; give fewer pixels, or "
                "drop it"
            )
        if self.synthesis.size is not None and self.synthesis.start is not None:
            yield "synthesis.size is given, but images start from pictures of the teacher's size; drop either"
        encoding = self.transfer_set.encoding
        if encoding.kind != "raw" and self.teacher.image_space.channels not in (1, 3):
            yield (
                f"transfer_set.encoding is {encoding.kind}, but images have {self.teacher.image_space.channels} "
                "channels; use raw, which takes any number"
            )
        if encoding.is_lossy and self.distill.teacher_logits == "stored":
            yield (
                f'distill.teacher_logits is "stored", but transfer_set.encoding {encoding.kind} changes the pixels '
                'that those logits belong to; use "live", or raw, png or {kind: webp, quality: 100}'
            )
        top_k, classes = self.transfer_set.logits.top_k, self.teacher.classes
        if top_k is not None and top_k >= classes:
            remedy = f"use at most {classes - 1}, or float16" if classes > 1 else "use float16"
            yield f"transfer_set.logits.k is {top_k}, but teacher.classes is {classes}; {remedy}"

    def _mistakes_in_verifier(self) -> Iterator[str]:
        if self.verifier is None:
            return
        classes, space = self.verifier.classes, self.verifier.image_space
        if classes not in (None, self.teacher.classes):
            yield (
                f"verifier.classes is {classes}, but teacher.classes is {self.teacher.classes}; give a network over "
                "the teacher's classes, or drop verifier"
            )
        channels = self.teacher.image_space.channels
        if space is not None and space.channels != channels:
            yield (
                f"verifier.image_space.channels is {space.channels}, but the teacher's is {channels}; give a network "
                "for such images, or drop verifier"
            )

    def _mistakes_in_numbers(self) -> Iterator[str]:
        if self.distill.batch_size < self.runtime.student_workers.max:
            yield (
                f"distill.batch_size is {self.distill.batch_size}, but runtime.student_workers.max is "
                f"{self.runtime.student_workers.max}; give each worker an image a step"
            )
        counts = Counter(self.classes)
        odd = next((label for label in counts if not 0 <= label < self.teacher.classes or counts[label] > 1), None)
        if odd is not None:
            yield (
                f"transfer_set.classes has {odd}, which is twice there or not a class of the teacher; "
                f"use each of 0 to {self.teacher.classes - 1} at most once"
            )
        if self.repeats % self.rounds or self.distill.steps < self.rounds:
            yield (
                f"rounds is {self.rounds}, but there are {self.repeats} units of images of each class and "
                f"{self.distill.steps} steps of the student to share out; use a divisor of {self.repeats}"
            )
        if self.transfer_set.unit.classes > len(self.classes):
            yield (
                f"transfer_set.unit.classes is {self.transfer_set.unit.classes}, but there are only "
                f"{len(self.classes)} classes; use at most that"
            )

    def _mistakes_in_workers(self) -> Iterator[str]:
        if self.runtime.executor != "ray" or self.runtime.device != "cuda":
            return
        gpus = {"gpus_per_student_worker": self.runtime.gpus_per_student_worker}
        if self.transfer_set.images_per_class:  # else there are none who only make images
            gpus["gpus_per_worker"] = self.runtime.gpus_per_worker
        for key, share in gpus.items():
            if not share:
                yield (
                    f'runtime.{key} is 0, but runtime.device is "cuda"; reserve a GPU or a share of one, such as 0.5, '
                    "or use auto, which takes the CPU there"
                )

    @property
    def classes(self) -> tuple[int, ...]:
        """The classes that images are made of."""
        chosen = self.transfer_set.classes
        return tuple(range(self.teacher.classes)) if chosen == "all" else chosen

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the teacher's classes: those in the recipe or in the file that it names, else their numbers.

        Raises:
            RecipeError: the file cannot be read, or has another number of names.
        """
        names, classes = self.teacher.class_names, self.teacher.classes
        if names is None:
            return tuple(str(label) for label in range(classes))
        if isinstance(names, tuple):
            return names
        text = read_text(names, f"teacher.class_names is {names!r}, which cannot be read")
        lines = tuple(line.strip() for line in text.splitlines() if line.strip())
        if len(lines) != classes:
            raise RecipeError(
                f"teacher.class_names is {names!r}, which has {len(lines)} names, but teacher.classes is {classes}; "
                "give a name a line"
            )
        return lines

    @property
    def made_space(self) -> ImageSpace:
        """The teacher's image space, in the size in which images are made."""
        space, size = self.teacher.image_space, self.synthesis.size
        return space if size is None else space.model_copy(update={"size": size})

    @property
    def repeats(self) -> int:
        """Units that each class is in."""
        return self.transfer_set.images_per_class // self.transfer_set.unit.images_per_class

    def plan(self) -> tuple[WorkUnit, ...]:
        """The units of work of this recipe, in order."""
        return plan_units(
            seed=self.seed,
            classes=self.classes,
            images_per_class=self.transfer_set.images_per_class,
            classes_per_unit=self.transfer_set.unit.classes,
            images_per_class_per_unit=self.transfer_set.unit.images_per_class,
        )

    def phases(self) -> tuple[Phase, ...]:
        """Synthesis and training in the order in which they happen."""
        return plan_phases(self.plan(), repeats=self.repeats, rounds=self.rounds, steps=self.distill.steps)

    @property
    def picture_folders(self) -> dict[str, str]:
        """Folders of the real pictures that synthesis reads, by their keys."""
        start, statistics = self.synthesis.start, self.synthesis.statistics
        found = {"synthesis.start.images": None if start is None else start.images, "synthesis.statistics": statistics}
        return {key: folder for key, folder in found.items() if folder is not None}

    def made_of(
        self,
        weights_sha256: str,
        *,
        is_against_student: bool = False,
        pictures: Mapping[str, str] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """Everything that affects a unit's pixels, as plain data: seed, teacher and its weights, synthesis, unit size.

        ``pictures`` holds the SHA-256 of what is in each of ``picture_folders``, and of the file of embeddings; that
        counts, not where they lie.

        The number of images is not part of it: a longer plan begins with the units of a shorter one, so a set can be
        extended. One whose images are made against the student cannot, because its training depends on all of them;
        there the student and its training count too. Secrets do not: a URL that was signed anew is the same one.
        """
        teacher = {"network", "options", "classes", "image_space"}
        unusual = {"output": self.teacher.output is not None, "temperature": self.teacher.temperature != 1}
        teacher |= {key for key, is_there in unusual.items() if is_there}
        payload = {
            "format": 1,
            "seed": self.seed,
            "teacher": _portable(self.teacher.model_dump(mode="json", include=teacher)),
            "weights": weights_sha256,
            "synthesis": self._synthesis_with(pictures),
            "unit": self.transfer_set.unit.model_dump(mode="json"),
        }
        if is_against_student:
            payload["against"] = {
                "student": _portable(self.student.model_dump(mode="json")),
                "distill": self._distill_without({"log_every", "checkpoint_every"}),
                "images_per_class": self.transfer_set.images_per_class,
                "rounds": self.rounds,
            }
        return dict(redacted_data(payload))

    def _synthesis_with(self, pictures: Mapping[str, str]) -> dict[str, Any]:
        """The section with contents instead of folders; without keys that are not given, as digests had them before."""
        given = {"start", "statistics", "statistics_per_class", "select", "embeddings", "size", "beside"}
        synthesis = self.synthesis.model_dump(mode="json", exclude=given)
        if self.synthesis.start is not None:
            synthesis["start"] = {
                "images": pictures["synthesis.start.images"],
                "noise": self.synthesis.start.noise,
            }
        if self.synthesis.statistics is not None:
            synthesis["statistics"] = pictures["synthesis.statistics"]
        if self.synthesis.statistics_per_class:
            synthesis["statistics_per_class"] = True
        if self.synthesis.size is not None:
            synthesis["size"] = self.synthesis.model_dump(mode="json", include={"size"})["size"]
        if self.synthesis.embeddings is not None:
            synthesis["embeddings"] = pictures["synthesis.embeddings"]
        if self.synthesis.select is not None:
            synthesis["select"] = self.synthesis.select.model_dump(mode="json")
        if self.synthesis.beside:
            synthesis["beside"] = [spec.model_dump(mode="json") for spec in self.synthesis.beside]
        return synthesis

    def trained_by(self) -> dict[str, Any]:
        """Everything that a student's training depends on beside its images, as plain data.

        The intervals of logging, checkpoints and versions, the size of the shuffle buffer and the number of threads
        are not part of it: a training resumes after a change of those.
        """
        how_only = {"log_every", "checkpoint_every", "publish_every", "threads"}
        distill = self._distill_without(how_only)
        distill["source"].pop("window_rows", None)
        payload = {
            "classes": list(self.classes),
            "images_per_class": self.transfer_set.images_per_class,
            **self.transfer_set.stored_as(),
            "student": _portable(self.student.model_dump(mode="json")),
            "distill": distill,
        }
        return dict(redacted_data(payload))

    def _distill_without(self, keys: set[str]) -> dict[str, Any]:
        """The section without some keys, and without later ones that are not given, as digests had it before."""
        spec = self.distill
        fields = type(spec).model_fields
        not_given = {
            key for key in ("clip_norm", "accumulate", "ema", "select") if getattr(spec, key) == fields[key].default
        }
        distill = spec.model_dump(mode="json", exclude=keys | not_given)
        if not spec.optimizer.warmup:
            del distill["optimizer"]["warmup"]
        return distill

    def located(self) -> Recipe:
        """The same recipe with absolute local paths, for processes that stand in another folder."""
        names = self.teacher.class_names
        moved = {"class_names": _located(names)} if isinstance(names, str) else {}
        teacher = self.teacher.model_copy(update={"weights": _located(self.teacher.weights), **moved})
        transfer_set = self.transfer_set.model_copy(update={"uri": _located(self.transfer_set.uri)})
        changes = {
            "teacher": teacher,
            "synthesis": self._located_synthesis(),
            "transfer_set": transfer_set,
            "run_dir": _located(self.run_dir),
            "verifier": self._verifier_with(_located),
        }
        return self.model_copy(update=changes)

    def moved_to(self, run_dir: str) -> Recipe:
        """The same recipe for a ``run_dir`` that was moved with all that is in it."""

        def moved(path: str) -> str:
            is_inside = "://" not in path and Path(path).is_relative_to(self.run_dir)
            return str(run_dir / Path(path).relative_to(self.run_dir)) if is_inside else path

        teacher = self.teacher.model_copy(update={"weights": moved(self.teacher.weights)})
        transfer_set = self.transfer_set.model_copy(update={"uri": moved(self.transfer_set.uri)})
        changes = {"teacher": teacher, "transfer_set": transfer_set, "run_dir": run_dir}
        return self.model_copy(update={**changes, "verifier": self._verifier_with(moved)})

    def _verifier_with(self, place: Callable[[str], str]) -> VerifierSpec | None:
        """The section with its weights in another place."""
        spec = self.verifier
        return spec and spec.model_copy(update={"weights": place(spec.weights)})

    def _located_synthesis(self) -> SynthesisSpec:
        start, statistics = self.synthesis.start, self.synthesis.statistics
        embeddings = self.synthesis.embeddings
        moved = {
            "start": start and start.model_copy(update={"images": _located(start.images)}),
            "statistics": statistics and _located(statistics),
            "embeddings": embeddings and _located(embeddings),
        }
        return self.synthesis.model_copy(update=moved)

    def with_synthesis(self, synthesis: Mapping[str, Any]) -> Recipe:
        """The recipe with another section ``synthesis``, which is checked by itself."""
        spec = SynthesisSpec.model_validate_json(json.dumps(dict(synthesis)))
        return self.model_copy(update={"synthesis": spec})

    def shown(self) -> dict[str, Any]:
        """The recipe as plain data without secrets, for reports and logs."""
        return dict(redacted_data(self.model_dump(mode="json")))

    def to_yaml(self) -> str:
        """The resolved recipe as a file that `load_recipe` reads; without secrets."""
        return yaml.safe_dump(self.shown(), sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)


def _located(path: str) -> str:
    return path if "://" in path or not is_file(path) else str(Path(path).absolute())


def _portable(section: dict[str, Any]) -> dict[str, Any]:
    """A network's section for a digest: a folder is the same one wherever it lies."""
    family, colon, name = section["network"].partition(":")
    if not name.startswith("/"):
        return section
    return {**section, "network": f"{family}{colon}{name.rstrip('/').rpartition('/')[2]}"}
