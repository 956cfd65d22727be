"""The model card of an exported student: what it is, what it was measured on, how to load it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from raydfkd import __version__
from raydfkd.config.schema import StudentSpec, TeacherSpec
from raydfkd.export.libraries import is_timm, is_transformers
from raydfkd.export.plain import own_module
from raydfkd.export.student import SavedStudent
from raydfkd.networks.build import count_parameters
from raydfkd.report.page import estimated
from raydfkd.report.redaction import redacted

LICENSE = "# license: fill in, such as apache-2.0; it may depend on that of the teacher"
_LOADING = {
    "safetensors": """`student.safetensors`, plain PyTorch with safetensors, numpy and pillow:

```python
from load import load_student, read_picture

logits = load_student()(read_picture("picture.png"))
```

`python load.py picture.png` prints the likeliest classes.""",
    "onnx": """`student.onnx`; takes `images`, float32 in [0, 1], and normalises them itself:

```python
import onnxruntime

session = onnxruntime.InferenceSession("student.onnx")
(logits,) = session.run(["logits"], {{"images": images}})  # numpy, [N, {shape}]
```""",
    "torch_export": """`student.pt2`; takes float32 images in [0, 1] and normalises them itself:

```python
import torch

logits = torch.export.load("student.pt2").module()(images)  # [N, {shape}]
```""",
    "timm": """`timm/`, as timm saves its models; takes normalised images:

```python
import timm

network = timm.create_model("local-dir:timm", pretrained=True).eval()
```""",
    "hf": """`hf/`, as transformers saves its models; takes normalised images:

```python
from transformers import AutoModelForImageClassification

network = AutoModelForImageClassification.from_pretrained("hf")
```""",
}


def model_card(student: SavedStudent, forms: Mapping[str, Mapping[str, Any]]) -> str:
    """The README.md of a folder with these ``forms`` of the student, each with what was found of it."""
    recipe = student.recipe
    parts = [
        f"# {recipe.name}: {recipe.student.network} taught by {recipe.teacher.network}",
        "A student that was distilled from a trained network without that network's data: from synthetic images, which "
        f"raydfkd {__version__} made by inverting the teacher.",
        "\n".join(_facts(student)),
        "## What it was measured on",
        "\n".join(_figures(student)),
        "## How to load it",
        *_loading(student, forms),
        "## License",
        "Not filled in. Whoever publishes this says under which license, here and in the head of this file.",
    ]
    return f"{_head(student)}\n" + "\n\n".join(parts) + "\n"


def _head(student: SavedStudent) -> str:
    library = "timm" if is_timm(student) else "transformers" if is_transformers(student) else "pytorch"
    data = {
        "library_name": library,
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "knowledge-distillation", "data-free", "raydfkd"],
    }
    return f"---\n{yaml.safe_dump(data, sort_keys=False)}{LICENSE}\n---\n"


def _facts(student: SavedStudent) -> Iterator[str]:
    recipe = student.recipe
    space, teacher = recipe.teacher.image_space, recipe.teacher
    named = ", ".join(student.class_names[:10]) + (", ..." if len(student.class_names) > 10 else "")
    weights = redacted(teacher.weights).rpartition("/")[2]
    size = f"{space.channels} channels, {space.height} x {space.width} pixels"
    made = f"{recipe.synthesis.synthesizer} synthesis, {recipe.distill.steps:,} steps of the student"
    facts = {
        "student": f"{_network(recipe.student)}, {count_parameters(student.network):,} parameters",
        "teacher": f"{_network(teacher)}, weights `{weights}`",
        "images": f"{size}; in [0, 1], minus {list(space.mean)}, divided by {list(space.std)}",
        "answers": f"logits of {teacher.classes:,} classes: {named}",
        "recipe": f"{recipe.name}, seed {recipe.seed}: {made}",
        "digest": f"`{student.digest}`",
    }
    yield from ("| | |", "|---|---|", *(f"| {name} | {fact} |" for name, fact in facts.items()))


def _network(spec: StudentSpec | TeacherSpec) -> str:
    return f"`{spec.network}`" + (f" `{spec.options}`" if spec.options else "")


def _figures(student: SavedStudent) -> Iterator[str]:
    report = student.report
    if report is None:
        yield "It was not judged: the run has no report of this training."
        return
    count = "" if report["judged_images"] is None else f"{report['judged_images']:,} "
    estimate = report["student"]["estimate"]
    yield "| | teacher | student |"
    yield "|---|---|---|"
    if report["student"]["top1"] is not None:
        top1 = [f"{report[role]['top1']:.2%}" for role in ("teacher", "student")]
        yield f"| top-1 on {count}{report['judged_on']} | {' | '.join(top1)} |"
    if estimate is not None:
        yield f"| agreement with the teacher on real images, estimated | | {estimated(estimate)} |"
    if report["agreement"] is not None:
        yield f"| agreement with the teacher on {count}{report['judged_on']} | | {report['agreement']:.2%} |"
    if report["student"]["top1"] is None:
        yield ""
        yield "What it does on real images nobody has measured."
    if estimate is not None:
        yield f"The estimate: {estimate['words']}."


def _loading(student: SavedStudent, forms: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    shape = ", ".join(map(str, student.recipe.teacher.image_space.shape))
    for form, found in forms.items():
        yield f"### {form}"
        yield _LOADING[form].format(shape=shape) if "{shape}" in _LOADING[form] else _LOADING[form]
        module = own_module(student)
        if form == "safetensors" and module is not None:
            yield f"The network's code is the module `{module}`, which is not in this folder: put it beside `load.py`."
        if form == "safetensors" and student.is_pruned:
            yield "`network.py` cuts the student out of the teacher's network with `pip install torch-pruning`."
        yield (
            f"Its logits differ by at most {found['max_abs_difference']:.2g} from those of the student in raydfkd, on "
            "8 random images."
        )
