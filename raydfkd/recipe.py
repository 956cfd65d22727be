"""The recipe: everything a run depends on, as frozen data with a digest of what affects pixels."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from raydfkd.registry import RecipeError, did_you_mean, explain
from raydfkd.schedule import WorkUnit, plan_units

Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]


class Spec(BaseModel):
    """Base of every section: frozen, strict, unknown keys and non-finite numbers refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class PluginSpec(Spec):
    """A plug-in by name with its options beside it; a bare string is a name without options."""

    model_config = ConfigDict(extra="allow")

    kind: str
    """Registered name."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """The plug-in's own options."""
        return self.model_extra or {}


class TermSpec(Spec):
    """One weighted term of the objective."""

    model_config = ConfigDict(extra="allow")

    term: str
    """Registered name of the loss."""
    weight: float = 1.0
    """Factor in the objective."""
    name: str
    """Name in logs, unique within the objective; the term's own name unless given."""

    @model_validator(mode="before")
    @classmethod
    def _named_after_term(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"term": value}
        return {"name": value["term"], **value} if isinstance(value, dict) and "term" in value else value

    @property
    def options(self) -> dict[str, Any]:
        """The term's own options."""
        return self.model_extra or {}


class ImageSpace(Spec):
    """What the teacher's input looks like: images are in [0, 1], then normalised per channel."""

    channels: Positive = 3
    """Channels of an image."""
    size: Positive
    """Height and width in pixels."""
    mean: tuple[float, ...]
    """Mean per channel that normalisation subtracts."""
    std: tuple[PositiveFloat, ...]
    """Standard deviation per channel that normalisation divides by."""

    @model_validator(mode="after")
    def _one_value_a_channel(self) -> ImageSpace:
        for key in ("mean", "std"):
            if len(getattr(self, key)) != self.channels:
                raise ValueError(
                    f"{key} has {len(getattr(self, key))} values; channels is {self.channels}, give as many"
                )
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return (self.channels, self.size, self.size)


class TeachSpec(Spec):
    """How to train the teacher on real data where its weights are not there yet."""

    epochs: Positive
    """Passes over the real training split."""
    batch_size: Positive = 64
    """Images per step."""
    lr: PositiveFloat = 0.01
    """Peak learning rate of AdamW on a one-cycle schedule."""
    weight_decay: NotNegative = 0.01
    """AdamW's weight decay."""
    augment: tuple[PluginSpec, ...] = ()
    """Augmentations of the real images."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the teacher's convolutions in training; weights and optimiser stay float32."""
    threads: Positive = 1
    """CPU threads; part of the recipe because a different split of a sum is a different last bit."""


class TeacherSpec(Spec):
    """The trained network that is to be inverted."""

    network: str
    """Short name, torchvision:NAME, or module:callable."""
    options: dict[str, Any] = {}
    """Keyword arguments of the network's constructor."""
    classes: Annotated[int, Field(ge=2)]
    """Number of classes, the width of its output."""
    image_space: ImageSpace
    """Its input."""
    weights: Text = "${run_dir}/teacher.safetensors"
    """Path or URL of a .safetensors or .pt state dict, or "random" (for benchmarks and tests)."""
    train: TeachSpec | None = None
    """How `raydfkd teach` trains it; `run` does so first where the weights are not there yet."""


class StudentSpec(Spec):
    """The smaller network that is to be trained."""

    network: str
    """Short name, torchvision:NAME, or module:callable."""
    options: dict[str, Any] = {}
    """Keyword arguments of the network's constructor."""


class SynthesisSpec(Spec):
    """How images are made; keys beyond these are options of the synthesizer."""

    model_config = ConfigDict(extra="allow")

    synthesizer: str
    """Registered name of the synthesizer."""
    objective: Annotated[tuple[TermSpec, ...], Field(min_length=1)]
    """Weighted terms, added up."""
    targets: PluginSpec = PluginSpec(kind="balanced")
    """Which labels images are made for."""
    augment: tuple[PluginSpec, ...] = ()
    """What the teacher sees instead of the bare image, at every step."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the teacher's convolutions; pixels, moments and optimiser stay float32."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the teacher with its taps; `auto` does on CUDA, while on CPU it takes minutes and gains little. Part of
    the recipe because another kernel is another last bit."""
    threads: Positive = 1
    """CPU threads of a worker; part of the recipe because a different split of a sum is a different last bit."""
    student_refresh: Positive = 200
    """Steps between looks for a newer student within a unit, where a term asks it; each unit begins with a look."""

    @model_validator(mode="after")
    def _unique_names(self) -> SynthesisSpec:
        names = [term.name for term in self.objective]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two terms are called {name}; give one of them another `name:`")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The synthesizer's own options."""
        return self.model_extra or {}


class UnitSpec(Spec):
    """Size of a unit of work."""

    classes: Positive
    """Classes that share a unit, packed on one device."""
    images_per_class: Positive
    """Images of each class in one unit."""


class EncodingSpec(Spec):
    """How pixels are stored; a bare string is a kind."""

    kind: Literal["raw", "png", "jpeg"] = "raw"
    """`raw` is fastest to write and read; `png` has the same pixels in a little less space, `jpeg` others, close to
    them, in much less. The stored logits are of the pixels before `jpeg`."""
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    """Of `jpeg`."""

    @model_validator(mode="before")
    @classmethod
    def _from_kind(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value


class TransferSetSpec(Spec):
    """Where the synthetic images live and how many there are."""

    uri: Text = "${run_dir}/transfer_set"
    """Any fsspec URL or a local path."""
    classes: Literal["all"] | tuple[int, ...] = "all"
    """Which classes, by number."""
    images_per_class: Positive
    """Images of each class; synthesis ends when every class has them."""
    unit: UnitSpec
    """Size of a unit of work."""
    part_rows: Positive = 4096
    """Rows of one Parquet file at most."""
    encoding: EncodingSpec = EncodingSpec()
    """How pixels are stored: raw, png, jpeg or {kind: jpeg, quality: 90}; png and jpeg are for 1 or 3 channels."""
    storage_options: dict[str, Any] = {}
    """Options of the file system (endpoint, profile, ...); never part of a digest or a report."""
    records: Literal["exclusive", "earliest"] = "exclusive"
    """Which of several attempts at a unit counts: the `exclusive` one that the store lets create its record, or, on
    object stores without create-only writes, the `earliest` by the store's clock."""

    @model_validator(mode="after")
    def _whole_units(self) -> TransferSetSpec:
        if self.images_per_class % self.unit.images_per_class:
            below = self.images_per_class // self.unit.images_per_class * self.unit.images_per_class
            above = below + self.unit.images_per_class
            remedy = f"{below} or {above}" if below else f"{above}"
            raise ValueError(
                f"images_per_class {self.images_per_class} is not a multiple of unit.images_per_class "
                f"{self.unit.images_per_class}; try {remedy}"
            )
        return self


class SourceSpec(Spec):
    """Where the student's batches come from."""

    kind: Literal["growing", "snapshot"] = "growing"
    """`growing` trains on what is committed so far; `snapshot` waits for the whole set."""
    wait_for: Positive = 1
    """Images that must be committed before the first step (growing)."""
    complete_by: Fraction = 0.5
    """Share of the student's steps that may pass before the set is complete; before that the student keeps pace
    with the synthesis, so that its last steps see every image."""
    refresh_steps: Positive | None = None
    """Steps after which a newer snapshot is taken although the pass over the old one has not ended (growing); unless
    given, only between passes."""
    window_rows: Positive = 65536
    """Rows that are shuffled together; memory per training worker is this many images over the number of workers."""


class OptimizerSpec(Spec):
    """The student's optimiser."""

    kind: Literal["adam", "sgd"] = "adam"
    """Adam, or SGD with Nesterov momentum."""
    lr: PositiveFloat
    """Peak learning rate."""
    weight_decay: NotNegative = 0.0
    """Weight decay (AdamW's form for adam)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of sgd; first beta of adam."""
    schedule: Literal["one_cycle", "cosine", "constant"] = "one_cycle"
    """Learning rate over the steps."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> OptimizerSpec:
        if self.kind == "sgd" and not self.momentum:
            raise ValueError("momentum is 0, but sgd's is Nesterov's; give one above 0, such as 0.9")
        return self


class DistillSpec(Spec):
    """How the student is trained."""

    steps: Positive
    """Optimiser steps."""
    batch_size: Positive = 128
    """Images per step over all training workers."""
    criterion: PluginSpec
    """Distance between student and teacher."""
    optimizer: OptimizerSpec
    """Optimiser and schedule."""
    source: SourceSpec = SourceSpec()
    """Which images, when."""
    augment: tuple[PluginSpec, ...] = ()
    """Augmentations of the synthetic images."""
    teacher_logits: Literal["live", "stored"] = "live"
    """`live` asks the teacher about each augmented image; `stored` reads its logits from the set."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of both networks' convolutions; weights, criterion and optimiser stay float32."""
    checkpoint_every: Positive = 500
    """Steps between checkpoints."""
    log_every: Positive = 50
    """Steps between entries of the learning curve."""
    publish_every: Positive = 500
    """Steps between versions of the student for synthesis, where a term of the objective asks it."""
    threads: Positive = 1
    """CPU threads of a training worker."""

    @model_validator(mode="after")
    def _stored_logits_fit_the_image(self) -> DistillSpec:
        if self.teacher_logits == "stored" and self.augment:
            raise ValueError('teacher_logits "stored" belongs to the bare image; use "live" or drop augment')
        return self


class Range(Spec):
    """An elastic number of workers."""

    min: Annotated[int, Field(ge=0)]
    """At least."""
    max: Positive
    """At most."""

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}; swap them")
        return self


class RuntimeSpec(Spec):
    """Where the work runs; nothing here changes a pixel."""

    executor: Literal["ray", "local"] = "ray"
    """`ray`, or everything in this process."""
    address: str = "auto"
    """Ray cluster to join; `auto` joins a running one or starts one here."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where the worker has a GPU."""
    workers: Range = Range(min=1, max=1)
    """Synthesis actors."""
    cpus_per_worker: Annotated[float, Field(ge=0)] = 1.0
    """CPUs that a synthesis actor reserves."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    """GPUs or share of one that a synthesis actor reserves."""
    resources_per_worker: dict[str, PositiveFloat] = {}
    """Other resources that a synthesis actor reserves, such as {synth: 1}."""
    checkpoint_every: Positive = 1000
    """Steps of a unit between saved states that another worker can go on from."""
    student_workers: Range = Range(min=1, max=1)
    """Workers of the training job."""
    cpus_per_student_worker: Annotated[float, Field(ge=0)] = 1.0
    """CPUs that a training worker reserves."""
    gpus_per_student_worker: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that a training worker reserves."""
    resources_per_student_worker: dict[str, PositiveFloat] = {}
    """Other resources that a training worker reserves, such as {train: 1}."""
    max_attempts: Positive = 3
    """Failures of a unit before it is set aside."""
    max_losses: Positive = 5
    """Deaths of a unit's worker in a row, preempted machines aside, before the unit is set aside."""

    @model_validator(mode="after")
    def _somebody_trains(self) -> RuntimeSpec:
        if self.student_workers.min < 1:
            raise ValueError("student_workers.min is 0, but the student needs at least 1 worker")
        return self


class BudgetSpec(Spec):
    """How a budget of device-seconds is spent where one is given instead of numbers of images and steps."""

    synthesis_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of it for synthesis; the student's training gets the rest."""


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
    real_data: PluginSpec | None = None
    """Real images that train the teacher where it has to be trained, and judge the student; nothing else reads them."""
    synthesis: SynthesisSpec
    """How images are made."""
    rounds: Positive = 1
    """Rounds of synthesis and training one after the other: from the second on, images are made against the student
    that the rounds before have trained."""
    transfer_set: TransferSetSpec
    """Where they go and how many."""
    distill: DistillSpec
    """How the student is trained."""
    runtime: RuntimeSpec = RuntimeSpec()
    """Where the work runs."""
    budget: BudgetSpec = BudgetSpec()
    """How `raydfkd bench quality` shares its budget out."""

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"name is {self.name!r}; use letters, digits, dash, dot and underscore")
        if "://" in self.run_dir:
            raise ValueError(f"run_dir is {self.run_dir!r}; it must be a folder, only transfer_set.uri may be a URL")
        if self.teacher.train is not None and self.real_data is None:
            raise ValueError("teacher.train needs real_data; say which, or drop train and give weights")
        if self.distill.batch_size < self.runtime.student_workers.max:
            raise ValueError(
                f"distill.batch_size is {self.distill.batch_size}, but runtime.student_workers.max is "
                f"{self.runtime.student_workers.max}; give each worker an image a step"
            )
        encoding = self.transfer_set.encoding.kind
        if encoding != "raw" and self.teacher.image_space.channels not in (1, 3):
            raise ValueError(
                f"transfer_set.encoding is {encoding}, but images have {self.teacher.image_space.channels} channels; "
                "use raw, which takes any number"
            )
        if encoding == "jpeg" and self.distill.teacher_logits == "stored":
            raise ValueError(
                'distill.teacher_logits is "stored", but transfer_set.encoding jpeg changes the pixels that those '
                'logits belong to; use "live", or raw or png'
            )
        for label in self.classes:
            if not 0 <= label < self.teacher.classes or self.classes.count(label) > 1:
                raise ValueError(
                    f"transfer_set.classes has {label}, which is twice there or not a class of the teacher; "
                    f"use each of 0 to {self.teacher.classes - 1} at most once"
                )
        if self.repeats % self.rounds or self.distill.steps < self.rounds:
            raise ValueError(
                f"rounds is {self.rounds}, but there are {self.repeats} units of images of each class and "
                f"{self.distill.steps} steps of the student to share out; use a divisor of {self.repeats}"
            )
        if self.transfer_set.unit.classes > len(self.classes):
            raise ValueError(
                f"transfer_set.unit.classes is {self.transfer_set.unit.classes}, but there are only "
                f"{len(self.classes)} classes; use at most that"
            )
        return self

    @property
    def classes(self) -> tuple[int, ...]:
        """The classes that images are made of."""
        chosen = self.transfer_set.classes
        return tuple(range(self.teacher.classes)) if chosen == "all" else chosen

    @property
    def repeats(self) -> int:
        """Units that each class is in."""
        return self.transfer_set.images_per_class // self.transfer_set.unit.images_per_class

    def round_of(self, unit: WorkUnit) -> int:
        """The round that makes ``unit``, from 0; each round makes whole repeats, so that it covers all classes."""
        return unit.repeat * self.rounds // self.repeats

    def steps_until(self, number: int) -> int:
        """Student steps until the end of round ``number``; also the version of the student that it trains."""
        return self.distill.steps * (number + 1) // self.rounds

    def plan(self) -> tuple[WorkUnit, ...]:
        """The units of work of this recipe, in order."""
        return plan_units(
            seed=self.seed,
            classes=self.classes,
            images_per_class=self.transfer_set.images_per_class,
            classes_per_unit=self.transfer_set.unit.classes,
            images_per_class_per_unit=self.transfer_set.unit.images_per_class,
        )

    def digest(self, weights_sha256: str, *, is_against_student: bool = False) -> str:
        """SHA-256 of what affects a unit's pixels: seed, teacher and its weights, synthesis, size of a unit.

        Not the number of images: a longer plan begins with the units of a shorter one, so a set can be extended. One
        whose images are made against the student cannot, because its training depends on all of them; there the
        student and its training count too.
        """
        payload = {
            "format": 1,
            "seed": self.seed,
            "teacher": self.teacher.model_dump(mode="json", include={"network", "options", "classes", "image_space"}),
            "weights": weights_sha256,
            "synthesis": self.synthesis.model_dump(mode="json"),
            "unit": self.transfer_set.unit.model_dump(mode="json"),
        }
        if is_against_student:
            payload["against"] = {
                "student": self.student.model_dump(mode="json"),
                "distill": self.distill.model_dump(mode="json", exclude={"log_every", "checkpoint_every"}),
                "images_per_class": self.transfer_set.images_per_class,
                "rounds": self.rounds,
            }
        return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()

    def located(self) -> Recipe:
        """The same recipe with absolute local paths, for processes that stand in another folder."""
        teacher = self.teacher.model_copy(update={"weights": _located(self.teacher.weights)})
        transfer_set = self.transfer_set.model_copy(update={"uri": _located(self.transfer_set.uri)})
        changes = {"teacher": teacher, "transfer_set": transfer_set, "run_dir": _located(self.run_dir)}
        return self.model_copy(update=changes)

    def shown(self) -> dict[str, Any]:
        """The recipe as plain data without secrets, for reports and logs."""
        data = self.model_dump(mode="json")
        data["transfer_set"]["storage_options"] = dict.fromkeys(self.transfer_set.storage_options, "***")
        return data


def _located(path: str) -> str:
    return path if "://" in path or path == "random" else str(Path(path).absolute())


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number, a date is text and a key given twice is an error."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise RecipeError(f"{key.value}: given twice, again in line {line}; keep one of them")
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def packaged_recipes() -> list[str]:
    """Names of the recipes that come with raydfkd."""
    folder = importlib.resources.files("raydfkd") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(source: str | Path, overrides: tuple[str, ...] | list[str] = (), run_dir: str | None = None) -> Recipe:
    """Read a recipe from a file or by the name of a packaged one.

    A recipe may start from another: ``recipe: NAME`` takes everything from that one and replaces what is given.
    ``overrides`` are ``a.b.c=value`` with YAML values; an entry of a list is addressed by its name or position.

    Raises:
        RecipeError: with the key, its value and what would be right.
    """
    data = _read(str(source), seen=())
    for override in overrides:
        _override(data, override)
    if run_dir is not None:
        data["run_dir"] = run_dir
    _expand(data)
    try:
        return Recipe.model_validate_json(json.dumps(data))
    except TypeError as error:
        raise RecipeError(f"{source} has a value that is not plain data: {error}") from None
    except ValidationError as error:
        raise RecipeError(explain(error, "", Recipe)) from None


def _read(source: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if source in seen:
        raise RecipeError(f"recipe: {' -> '.join((*seen, source))} goes in a circle; name another base")
    path = Path(source)
    if path.is_file():
        text = _text(path)
    elif source in packaged_recipes():
        text = (importlib.resources.files("raydfkd") / "recipes" / f"{source}.yaml").read_text()
    elif path.suffix in (".yaml", ".yml") or "/" in source:
        raise RecipeError(f"{source}: no such file; give a recipe file or one of: {', '.join(packaged_recipes())}")
    else:
        raise RecipeError(f"{source}: no such recipe; {did_you_mean(source, packaged_recipes())}")
    try:
        data = yaml.load(text, _Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{source} is not a recipe: the top of the file must be keys like `teacher:`")
    base = data.pop("recipe", None)
    if base is None:
        return data
    beside = path.parent / str(base)
    return _merge(_read(str(beside if beside.is_file() else base), (*seen, source)), data)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise RecipeError(f"{path} cannot be read as a recipe: {reason}") from None


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` in it: mappings merge, everything else is replaced.

    A mapping that names another plug-in replaces the old one whole, whose options would not suit it; another network
    has none of the old one's options.
    """
    if any(base.get(key, name) != name for key, name in changes.items() if key in ("kind", "synthesizer")):
        return changes
    merged = dict(base)
    if base.get("network") != changes.get("network", base.get("network")):
        merged.pop("options", None)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _override(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set {override}: write it as key=value, such as seed=1")
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError:
        raise RecipeError(f"--set {override}: {text!r} is not a YAML value; quote it") from None
    place: Any = data
    parts = path.split(".")
    for depth, part in enumerate(parts):
        key: Any = part
        if isinstance(place, list):
            names = [_entry_name(entry, index) for index, entry in enumerate(place)]
            if part.isdigit() and int(part) < len(place):
                key = int(part)
            elif part in names:
                key = names.index(part)
            else:
                where = ".".join(parts[:depth])
                raise RecipeError(f"--set {override}: {where} has no entry {part!r}; {did_you_mean(part, names)}")
            if isinstance(place[key], str) and depth < len(parts) - 1:
                place[key] = {"term" if "objective" in parts[:depth] else "kind": place[key]}
        elif not isinstance(place, dict):
            raise RecipeError(f"--set {override}: {'.'.join(parts[:depth])} is {place!r}, which has no keys inside")
        if depth == len(parts) - 1:
            place[key] = value
        elif isinstance(place, dict):
            place = place.setdefault(key, {})
        else:
            place = place[key]


def _entry_name(entry: Any, index: int) -> str:
    if isinstance(entry, dict):
        return str(entry.get("name") or entry.get("term") or entry.get("kind") or index)
    return str(entry)


def _expand(data: dict[str, Any]) -> None:
    """Put the run's name and folder where ``${name}`` and ``${run_dir}`` stand."""
    values = {"name": str(data.get("name", ""))}
    run_dir = data.get("run_dir", Recipe.model_fields["run_dir"].default)
    values["run_dir"] = str(run_dir).replace("${name}", values["name"]).rstrip("/")

    def expand(value: Any, where: str) -> Any:
        if isinstance(value, dict):
            return {key: expand(inner, f"{where}.{key}".lstrip(".")) for key, inner in value.items()}
        if isinstance(value, list):
            return [expand(inner, f"{where}.{index}") for index, inner in enumerate(value)]
        if not isinstance(value, str):
            return value
        for name in re.findall(r"\$\{(\w+)\}", value):
            if name not in values:
                raise RecipeError(f"{where} is {value!r}: unknown placeholder; {did_you_mean(name, values)}")
            value = value.replace(f"${{{name}}}", values[name])
        return value

    data["run_dir"] = values["run_dir"]
    for section, key in (("teacher", "weights"), ("transfer_set", "uri")):
        model = TeacherSpec if section == "teacher" else TransferSetSpec
        if isinstance(data.get(section), dict):
            data[section].setdefault(key, model.model_fields[key].default)
    data.update(expand(data, ""))
