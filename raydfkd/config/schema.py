"""The schema of a recipe: its sections as frozen data, with a sentence on each field."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
Precision = Literal["float32", "bfloat16"]
Text = Annotated[str, Field(min_length=1)]


class Spec(BaseModel):
    """Base of every section: frozen, strict, unknown keys and non-finite numbers refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class OpenSpec(Spec):
    """Base of a section that names a plug-in; keys beyond its own are the options of that plug-in."""

    model_config = ConfigDict(extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        """The plug-in's own options."""
        return self.model_extra or {}


class PluginSpec(OpenSpec):
    """A plug-in by name with its options beside it; a bare string is a name without options."""

    kind: str
    """Registered name."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value


@dataclass(frozen=True, slots=True)
class Family:
    """Annotates a field with the family that its plug-in belongs to, a key of ``families.REGISTRIES``."""

    name: str


Targets = Annotated[PluginSpec, Family("targets")]
Augmentation = Annotated[PluginSpec, Family("augmentations")]
Criterion = Annotated[PluginSpec, Family("criteria")]
LossTerm = Annotated[PluginSpec, Family("terms")]
Generator = Annotated[PluginSpec, Family("generators")]
Source = Annotated[PluginSpec, Family("sources")]
RealDataSet = Annotated[PluginSpec, Family("real_data")]


class Ramp(Spec):
    """A number that changes linearly over a share of the steps, and then keeps its last value."""

    model_config = ConfigDict(serialize_by_alias=True)

    start: float = Field(alias="from")
    """Its value at the first step."""
    to: float
    """Its value from the end of that share on."""
    until: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the steps over which it changes."""

    def at(self, progress: float) -> float:
        """Its value once the share ``progress`` of the steps is made."""
        return self.start + (self.to - self.start) * min(1.0, progress / self.until)


Weight = Annotated[
    Annotated[float, Tag("tagged-number")] | Annotated[Ramp, Tag("tagged-ramp")],
    Discriminator(lambda value: "tagged-ramp" if isinstance(value, dict | Ramp) else "tagged-number"),
]


class TermSpec(OpenSpec):
    """One weighted term of the objective."""

    term: str
    """Registered name of the loss."""
    weight: Weight = 1.0
    """Factor in the objective; {from: 0, to: 10, until: 0.5} lets it grow over the first half of the steps."""
    name: str
    """Name in logs, unique within the objective; the term's own name unless given."""

    @model_validator(mode="before")
    @classmethod
    def _named_after_term(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"term": value}
        return {"name": value["term"], **value} if isinstance(value, dict) and "term" in value else value


def _size(value: Any) -> Any:
    edges = [value] if isinstance(value, int) else value
    if (
        not isinstance(edges, list | tuple)
        or not all(isinstance(edge, int) and not isinstance(edge, bool) and edge >= 1 for edge in edges)
        or (edges is value and len(edges) != 2)
    ):
        raise ValueError("give a number of pixels, or [height, width]")
    return edges[0] if len(set(edges)) == 1 else tuple(edges)


Size = Annotated[int | tuple[int, int], BeforeValidator(_size)]
"""Pixels of a square's edge, or height and width; two equal numbers are one."""


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the channels of ImageNet's images in [0, 1], with which most published networks normalise."""


class ImageSpace(Spec):
    """The form of the teacher's input: images are in [0, 1], then normalised per channel."""

    channels: Positive = 3
    """Channels of an image."""
    size: Size
    """Height and width in pixels: a number, or [height, width] where images are not square."""
    mean: tuple[float, ...]
    """Mean of each channel, from 0 to 1, that normalisation subtracts."""
    std: tuple[PositiveFloat, ...]
    """Standard deviation of each channel, at most 1, that normalisation divides by."""

    @model_validator(mode="after")
    def _one_value_a_channel(self) -> ImageSpace:
        for key in ("mean", "std"):
            if len(getattr(self, key)) != self.channels:
                raise ValueError(
                    f"{key} has {len(getattr(self, key))} values; channels is {self.channels}, give as many"
                )
        return self

    @model_validator(mode="after")
    def _constants_of_images_in_0_to_1(self) -> ImageSpace:
        for key, values, scaled in (("mean", self.mean, max(map(abs, self.mean))), ("std", self.std, max(self.std))):
            if max(values) > 1 or min(values) < 0:
                remedy = "divide by 255" if 1 < scaled <= 255 and min(values) >= 0 else "use those of images in [0, 1]"
                raise ValueError(f"{key} is {list(values)}, but images are in [0, 1] before normalisation; {remedy}")
        return self

    @property
    def height(self) -> int:
        """Pixels from top to bottom."""
        return self.size if isinstance(self.size, int) else self.size[0]

    @property
    def width(self) -> int:
        """Pixels from left to right."""
        return self.size if isinstance(self.size, int) else self.size[1]

    @property
    def size_text(self) -> str:
        """The size as a recipe has it: 32, or [32, 16]."""
        return str(self.size if isinstance(self.size, int) else list(self.size))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return (self.channels, self.height, self.width)


class TeachSpec(Spec):
    """The training of the teacher on real data, where its weights are not there yet."""

    epochs: Positive
    """Epochs over the real training split."""
    batch_size: Positive = 64
    """Images per step."""
    lr: PositiveFloat = 0.01
    """Peak learning rate of AdamW on a one-cycle schedule."""
    weight_decay: NotNegative = 0.01
    """AdamW's weight decay."""
    augment: tuple[Augmentation, ...] = ()
    """Augmentations of the real images."""
    precision: Precision = "float32"
    """Arithmetic of the teacher's convolutions in training, `float32` or `bfloat16`, which is faster where the hardware
    has it; weights and optimiser stay float32."""
    threads: Positive = 1
    """CPU threads; part of the recipe because a different split of a sum is a different last bit."""


LIBRARIES = ("torchvision", "timm", "pypi", "hf", "torchhub", "torchscript", "export")
"""Families of networks that are given as family:name; everything else with a colon is module:callable."""


def is_own(weights: str) -> bool:
    """Whether ``weights`` is no file but the name of weights that a network of a library comes with."""
    return re.fullmatch(r"pretrained|DEFAULT|[A-Z][A-Z0-9]*(_[A-Z0-9]+)+", weights) is not None


def is_file(weights: str) -> bool:
    """Whether ``weights`` is the path or URL of a file."""
    return weights != "random" and not is_own(weights)


class TrainedSpec(Spec):
    """A network that somebody has trained."""

    network: str
    """Short name, `module:callable`, or of a library: torchvision:NAME, timm:NAME, pypi:NAME, hf:REPO_OR_FOLDER,
    torchhub:REPO:NAME, torchscript:FILE, export:FILE."""
    options: dict[str, Any] = {}
    """Keyword arguments of the network's constructor."""
    allow_code: bool = False
    """Run code that comes with the network: of torchhub repositories, TorchScript files and exported programs."""
    output: Literal["logits", "probabilities", "log_probabilities", "sigmoid"] | None = None
    """What it answers, found on two random images unless given: `logits`, `probabilities` of a softmax or their
    logarithms, `log_probabilities`, or a `sigmoid` for each class, of classes that exclude each other."""
    weights: Text
    """Path or URL of a .safetensors or .pt state dict or of the index of a sharded one; "pretrained", or a name such as
    IMAGENET1K_V2, for weights that the network comes with; "random" for benchmarks and tests."""


class TeacherSpec(TrainedSpec):
    """The trained network that is to be inverted.

    Of torchvision:, timm:, pypi: and hf: networks `classes`, `class_names`, `image_space` and `weights` are those that
    the library publishes, unless given.
    """

    classes: Annotated[int, Field(ge=2)]
    """Number of classes, the width of the teacher's output."""
    class_names: Text | Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    """Names of the classes in galleries and reports, in their order: a list, or a text file with a name a
    line. Numbers, or the names of `real_data`, unless given."""
    image_space: ImageSpace
    """Channels, size and normalisation of the images that it takes."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """What its logits are divided by, everywhere: above one for a teacher that is sure of all that it sees, noise
    included. `raydfkd init` finds it; which class comes first stays as it is."""
    weights: Text = "${run_dir}/teacher.safetensors"
    """Path or URL of a .safetensors or .pt state dict or of the index of a sharded one; "pretrained", or a name such as
    IMAGENET1K_V2, for weights that the network comes with; "random" for benchmarks and tests."""
    train: TeachSpec | None = None
    """Its training by `raydfkd teach`; `run` trains it first where the weights are not there yet."""

    @model_validator(mode="after")
    def _a_name_for_each_class(self) -> TeacherSpec:
        if isinstance(self.class_names, tuple) and len(self.class_names) != self.classes:
            raise ValueError(
                f"class_names has {len(self.class_names)} names, but classes is {self.classes}; give as many"
            )
        return self

    @model_validator(mode="after")
    def _trained_before_it_is_tempered(self) -> TeacherSpec:
        if self.train is not None and self.temperature != 1:
            raise ValueError(
                f"temperature is {self.temperature:g}, but a network that train is to train would learn to outdo it; "
                "drop either"
            )
        return self


class VerifierSpec(TrainedSpec):
    """Another trained network over the teacher's classes, which judges the synthetic images and does nothing else.

    Of networks of libraries `classes`, `image_space` and `weights` are those that the library publishes, unless given.
    Where the library, the weights or their hub is not there, the images are not verified, and that is said.
    """

    classes: int | None = None
    """Number of its classes, the teacher's in the same order; null where its library could not be asked."""
    image_space: ImageSpace | None = None
    """Channels, size and normalisation of the images that it takes; its size may be another than the teacher's. Null
    where its library could not be asked."""

    @model_validator(mode="after")
    def _known(self) -> VerifierSpec:
        for key in ("classes", "image_space"):
            if getattr(self, key) is None and self.network.partition(":")[0] not in LIBRARIES:
                raise ValueError(f"{key} is missing; say which {self.network} has")
        return self

    @property
    def as_teacher(self) -> TeacherSpec:
        """The same network as a teacher has it, whose classes and image space are known."""
        return TeacherSpec.model_validate_json(self.model_dump_json())


class StudentSpec(Spec):
    """The smaller network that is to be trained."""

    network: str
    """As of the teacher, with fresh weights; or pruned_teacher, a part of the teacher itself, with its weights."""
    options: dict[str, Any] = {}
    """Keyword arguments of the network's constructor."""


class StartSpec(Spec):
    """Real pictures, without labels, that the optimisation of pixels starts from instead of noise."""

    images: Text
    """Folder of the pictures, on every machine that works; each start is one of them, drawn by the unit's seed."""
    noise: NotNegative = 0.0
    """Standard deviation of the noise added to them, in nominal units: 1 is 0.225 of the range from black to white."""


class SelectSpec(PluginSpec):
    """The choice of the images that are kept; keys beyond these are options of the selector (`raydfkd show selectors`).

    A bare string is a selector.
    """

    candidates: Annotated[float, Field(ge=1)] = 1.5
    """Images that are made for each one that is kept."""
    judged_at_once: Positive = 256
    """Images that are judged together, or more where a batch has more; so many are held."""


class BesideSpec(PluginSpec):
    """Images of another synthesizer in every unit; keys beyond these are its options (`raydfkd show synthesizers`).

    A bare string is a synthesizer.
    """

    images: PositiveFloat = 1.0
    """Images of it for each one of the section's own synthesizer."""
    objective: Annotated[tuple[TermSpec, ...], Field(strict=False)] = ()
    """Weighted terms, added up; none for a synthesizer that optimises nothing."""
    targets: Targets = PluginSpec(kind="balanced")
    """Labels that its images are made for."""
    augment: Annotated[tuple[Augmentation, ...], Field(strict=False)] = ()
    """Augmentations through which the teacher sees its images, at every step."""
    select: Annotated[SelectSpec, Family("selectors")] | None = None
    """Choice of its images that are kept, of more than are wanted; all that are made unless given."""


class SynthesisSpec(OpenSpec):
    """The making of the images; keys beyond these are options of the synthesizer (`raydfkd show synthesizers`)."""

    synthesizer: str
    """Registered name of the synthesizer."""
    objective: tuple[TermSpec, ...] = ()
    """Weighted terms, added up; none for a synthesizer that optimises nothing."""
    targets: Targets = PluginSpec(kind="balanced")
    """Labels that images are made for."""
    augment: tuple[Augmentation, ...] = ()
    """Augmentations through which the teacher sees the image, at every step."""
    start: StartSpec | None = None
    """Real pictures that the optimisation of pixels starts from; noise unless given."""
    statistics: Text | None = None
    """Folder of about 100 real pictures, on every machine that works: moments are compared with theirs instead of with
    those that BatchNorm stored, before norm layers of any kind, or where there is none behind convolutions and hidden
    linear layers."""
    size: Size | None = None
    """Pixels of the images that are made and stored, fewer than the teacher's, to which they are enlarged wherever a
    network sees them; the teacher's unless given."""
    embeddings: Text | None = None
    """File of a vector a class (.npy, .safetensors or .pt of [classes, width]), such as a text encoder's of their
    names, which tells a conditional generator its class; one-hot vectors unless given. Outside knowledge, and said to
    be that."""
    statistics_per_class: bool = False
    """Compare the moments of each class, in terms of scope class, with those of the pictures in the folder of
    `statistics` that is called as it is, by its name or number."""
    select: Annotated[SelectSpec, Family("selectors")] | None = None
    """Choice of the images that are kept, of more than are wanted; all that are made unless given."""
    beside: tuple[Annotated[BesideSpec, Family("synthesizers")], ...] = ()
    """Other synthesizers whose images each unit has too, so that a set is diverse by construction."""
    precision: Precision = "float32"
    """Arithmetic of the teacher's convolutions, `float32` or `bfloat16`, which is faster where the hardware has it;
    pixels, moments and optimiser stay float32."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the teacher with its taps; `auto` does on CUDA only, for on a CPU it takes minutes and gains little. Part
    of the recipe because another kernel is another last bit."""
    threads: Positive = 1
    """CPU threads of a worker; part of the recipe because a different split of a sum is a different last bit."""
    student_refresh: Positive = 200
    """Steps between looks for a newer student within a unit, where a term asks it; each unit begins with a look."""

    @model_validator(mode="after")
    def _statistics_to_take(self) -> SynthesisSpec:
        if self.statistics_per_class and self.statistics is None:
            raise ValueError("statistics_per_class is true, but statistics names no folder; give one, or drop it")
        return self

    def of_beside(self, spec: BesideSpec) -> SynthesisSpec:
        """The section of ``spec`` alone, with sizes and arithmetic of this one, and its statistics if it optimises."""
        common = {"size", "embeddings", "precision", "compile", "threads", "student_refresh"}
        common |= {"statistics"} if spec.objective else set()
        data = self.model_dump(include=common) | spec.model_dump(exclude={"kind", "images"})
        return SynthesisSpec.model_validate_json(json.dumps({"synthesizer": spec.kind, **data}))

    @model_validator(mode="after")
    def _unique_names(self) -> SynthesisSpec:
        names = [term.name for term in self.objective]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two terms are called {name}; give one of them another `name:`")
            if name in ("", "step", "total"):
                raise ValueError(f"a term is called {name!r}, which logs have another use for; give it another `name:`")
        return self


class UnitSpec(Spec):
    """Size of a unit of work."""

    classes: Positive
    """Classes that share a unit, packed on one device."""
    images_per_class: Positive
    """Images of each class in one unit."""


class EncodingSpec(Spec):
    """The encoding of stored pixels; a bare string is a kind."""

    kind: Literal["raw", "png", "jpeg", "webp"] = "raw"
    """`raw` is fastest to write and read; `png` has the same pixels in a little less space, `jpeg` and `webp` others,
    close to them, in much less. `webp` has colours at half the size. The stored logits are of the pixels before."""
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    """Quality of `jpeg` and `webp`; the others ignore it. 100 is the lossless form of `webp`, which has every pixel."""

    @model_validator(mode="before")
    @classmethod
    def _from_kind(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @property
    def is_lossy(self) -> bool:
        """Whether the pixels that are read are others than those that were made."""
        return self.kind == "jpeg" or (self.kind == "webp" and self.quality < 100)


class LogitsSpec(Spec):
    """The form of stored logits; a bare string is a kind."""

    kind: Literal["float16", "top_k"] = "float16"
    """`float16` stores those of all classes, `top_k` the largest and how large the others are together: readers get
    all of them, the others equal."""
    k: Positive = 10
    """Logits of an image that `top_k` stores, fewer than there are classes; 4 bytes each."""

    @model_validator(mode="before")
    @classmethod
    def _from_kind(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @property
    def top_k(self) -> int | None:
        """Logits of an image that are stored; None for all of them."""
        return self.k if self.kind == "top_k" else None

    def bytes_of(self, classes: int) -> int:
        """Bytes that those of an image take: float16, and with top_k the numbers of their classes beside them."""
        return 2 * classes if self.kind == "float16" else 2 * (self.k + 1) + (2 if classes <= 2**15 else 4) * self.k


class TransferSetSpec(Spec):
    """The store of the synthetic images, and their number."""

    uri: Text = "${run_dir}/transfer_set"
    """Any fsspec URL or a local path."""
    classes: Literal["all"] | Annotated[tuple[int, ...], Field(min_length=1)] = "all"
    """Numbers of the classes that images are made for; `all` of them unless chosen."""
    images_per_class: Count = 0
    """Images of each class; synthesis ends when every class has them. 0 for live sources, which make their own."""
    unit: UnitSpec = UnitSpec(classes=1, images_per_class=1)
    """Size of a unit of work."""
    part_rows: Positive = 4096
    """Maximum of rows in one Parquet file."""
    encoding: EncodingSpec = EncodingSpec()
    """Encoding of stored pixels: raw, png, jpeg, webp or {kind: jpeg, quality: 90}; all but raw for 1 or 3 channels."""
    logits: LogitsSpec = LogitsSpec()
    """Form of the teacher's stored logits: float16 or {kind: top_k, k: 10}, which takes far less of many classes."""
    storage_options: dict[str, Any] = {}
    """Options of the file system (endpoint, profile, ...); never part of a digest or a report."""

    def stored_as(self) -> dict[str, Any]:
        """The form of pixels and logits as plain data for digests, which had no logits before there was a choice."""
        later = {"logits"} if self.logits.top_k is None else set()
        return self.model_dump(mode="json", include={"encoding", "logits"} - later)

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


class CriterionSpec(PluginSpec):
    """One of several criteria that a student's loss is the weighted sum of."""

    model_config = ConfigDict(serialize_by_alias=True)

    weight: Weight = 1.0
    """Factor in the loss; {from: 1, to: 0, until: 0.5} lets it fade over the first half of the steps."""
    since: BelowOne = Field(0.0, alias="from")
    """Share of the steps from which on it counts."""
    until: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the steps from which on it counts no longer."""
    name: str
    """Name in the learning curve, unique among the criteria; the criterion's own name unless given."""

    @model_validator(mode="before")
    @classmethod
    def _named_after_kind(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"kind": value}
        return {"name": value.get("kind", ""), **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _counts_at_some_step(self) -> CriterionSpec:
        if self.since >= self.until:
            raise ValueError(
                f"{self.kind} counts from {self.since:g} until {self.until:g}, which is never; give a later until"
            )
        return self

    def counts_at(self, progress: float) -> bool:
        """Whether it counts in the step before which the share ``progress`` of the steps is made."""
        return self.since <= progress and (progress < self.until or self.until == 1)


Criteria = Annotated[
    Annotated[tuple[Annotated[CriterionSpec, Family("criteria")], ...], Field(min_length=1), Tag("tagged-several")]
    | Annotated[Criterion, Tag("tagged-one")],
    Discriminator(lambda value: "tagged-several" if isinstance(value, list | tuple) else "tagged-one"),
]


class OptimizerSpec(Spec):
    """The student's optimiser."""

    kind: Literal["adam", "sgd"] = "adam"
    """`adam` with the weight decay of AdamW, or `sgd` with Nesterov momentum."""
    lr: PositiveFloat
    """Peak learning rate."""
    weight_decay: NotNegative = 0.0
    """Weight decay (AdamW's form for adam)."""
    momentum: BelowOne = 0.9
    """Momentum of sgd; first beta of adam. Under one_cycle it is the middle of a cycle: 0.9 goes from 0.95 down to 0.85
    while the rate rises, and back."""
    schedule: Literal["one_cycle", "cosine", "constant"] = "one_cycle"
    """Learning rate over the steps: `one_cycle` rises to the peak and falls to nearly zero, `cosine` falls from the
    peak to zero, `constant` stays there."""
    warmup: BelowOne = 0.0
    """Share of the steps over which the rate first rises from nearly zero to its peak; not for `one_cycle`, which has a
    rise of its own."""

    @model_validator(mode="after")
    def _one_rise(self) -> OptimizerSpec:
        if self.warmup and self.schedule == "one_cycle":
            raise ValueError(
                f"warmup is {self.warmup:g}, but one_cycle rises by itself; drop it, or use schedule cosine or constant"
            )
        return self

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> OptimizerSpec:
        if self.kind == "sgd" and not self.momentum:
            raise ValueError("momentum is 0, but sgd's is Nesterov's; give one above 0, such as 0.9")
        return self


class DistillSpec(Spec):
    """The training of the student."""

    steps: Positive
    """Optimiser steps."""
    batch_size: Positive = 128
    """Images per step over all train workers at most; a little fewer where a buffer does not divide evenly."""
    criterion: Criteria
    """Distance between student and teacher: a criterion, or a list of them, of which each may have a `weight` and count
    `from` one share of the steps `until` another: [{kind: activation_boundary, ..., until: 0.3}, {kind: soft_kl, from:
    0.3}]."""
    optimizer: OptimizerSpec
    """Optimiser and schedule."""
    clip_norm: PositiveFloat | None = None
    """Norm of the gradient of all weights together, down to which a larger one is scaled; as large as it is unless
    given."""
    accumulate: Positive = 1
    """Parts of equal size in which the images of a step go through the networks, one after the other, to save memory.
    Their gradients make one step; BatchNorm normalises each part by itself."""
    ema: BelowOne = 0.0
    """Share that the average of the student's weights and statistics over the steps keeps of itself in a step, such as
    0.999; in the first steps less. The average is then the student that is judged, published and saved."""
    source: Source = PluginSpec(kind="growing")
    """Source of its images: growing, snapshot or live."""
    holdout: BelowOne = 0.1
    """Share of the images that the student never trains on, so that it can be judged on them; in whole repeats of all
    classes, at least one. Nothing is held out where `real_data` judges."""
    augment: tuple[Augmentation, ...] = ()
    """Augmentations of the synthetic images."""
    teacher_logits: Literal["live", "stored"] = "live"
    """`live` asks the teacher about each augmented image; `stored` reads its logits from the set."""
    precision: Precision = "float32"
    """Arithmetic of both networks' convolutions, `float32` or `bfloat16`, which is faster where the hardware has it;
    weights, criterion and optimiser stay float32."""
    checkpoint_every: Positive = 500
    """Steps between checkpoints of the training."""
    log_every: Positive = 50
    """Steps between entries of the learning curve."""
    publish_every: Positive = 500
    """Steps between versions of the student for synthesis, where a term of the objective asks it."""
    select: Literal["last", "estimate"] = "last"
    """Student that is the result: that of the last step, or the best, by the evidence that the report's estimate rests
    on, of the versions of the second half of the steps (`publish_every`) and the last."""
    threads: Positive = 1
    """CPU threads of a train worker."""

    @model_validator(mode="after")
    def _stored_logits_fit_the_image(self) -> DistillSpec:
        if self.teacher_logits == "stored" and self.augment:
            raise ValueError('teacher_logits "stored" belongs to the bare image; use "live" or drop augment')
        return self

    @model_validator(mode="after")
    def _images_in_each_part(self) -> DistillSpec:
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate is {self.accumulate}, but a step has only {self.batch_size} images; use at most that"
            )
        return self

    @model_validator(mode="after")
    def _criteria_of_all_steps(self) -> DistillSpec:
        if not isinstance(self.criterion, tuple):
            return self
        names = [one.name for one in self.criterion]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two criteria are called {twice}; give one of them another `name:`")
        reached = 0.0
        for one in sorted(self.criterion, key=lambda one: one.since):
            if one.since > reached:
                break
            reached = max(reached, one.until)
        if reached < 1:
            raise ValueError(
                f"no criterion counts from {reached:g} of the steps on; let one begin there, with `from: {reached:g}`, "
                "or another end later"
            )
        return self


class Range(Spec):
    """An elastic number of workers, from `min` to `max`."""

    min: Count = 1
    """Minimum of workers: synthesis keeps that many when it runs out of units, training waits for that many."""
    max: Positive = 1
    """Maximum of workers, as far as the cluster has room for them."""

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}; raise max or lower min")
        return self


class RuntimeSpec(Spec):
    """The workers and devices that do the work; nothing here changes a pixel."""

    executor: Literal["ray", "local"] = "ray"
    """`ray` works in processes of a Ray cluster, `local` does everything in this process."""
    address: str = "auto"
    """Ray cluster to join; `auto` joins a running one or starts one here."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that workers compute on: `cpu`, `cuda`, or `auto`, which takes CUDA where a GPU is reserved for the
    worker. The process that drives a run on Ray needs none."""
    workers: Range = Range()
    """Synthesis actors."""
    cpus_per_worker: NotNegative = 1.0
    """CPUs that a synthesis actor reserves."""
    gpus_per_worker: NotNegative = 0.0
    """GPUs or share of one that a synthesis actor reserves."""
    resources_per_worker: dict[str, PositiveFloat] = {}
    """Other resources that a synthesis actor reserves, such as {synth: 1}."""
    checkpoint_every: Positive = 1000
    """Steps of a unit between checkpoints, from which another worker can resume it."""
    student_workers: Range = Range()
    """Workers of the training job."""
    cpus_per_student_worker: NotNegative = 1.0
    """CPUs that a train worker reserves."""
    gpus_per_student_worker: NotNegative = 0.0
    """GPUs that a train worker reserves."""
    resources_per_student_worker: dict[str, PositiveFloat] = {}
    """Other resources that a train worker reserves, such as {train: 1}."""
    max_attempts: Positive = 3
    """Failures of a unit before it is given up."""
    max_losses: Positive = 5
    """Deaths of a unit's worker in a row, preempted machines aside, before the unit is given up."""

    @model_validator(mode="after")
    def _somebody_trains(self) -> RuntimeSpec:
        if self.student_workers.min < 1:
            raise ValueError("student_workers.min is 0, but the student needs at least 1 worker")
        return self

    @property
    def driver_device(self) -> Literal["auto", "cpu", "cuda"]:
        """Device of the process that drives the run: the workers' where it is the worker, else what there is."""
        return "auto" if self.executor == "ray" and self.device == "cuda" else self.device


class BudgetSpec(Spec):
    """The shares of a budget of device-seconds, given instead of numbers of images and steps."""

    synthesis_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of it for synthesis; the student's training gets the rest."""
