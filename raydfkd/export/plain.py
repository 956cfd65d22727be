"""The student as weights with a few lines of plain PyTorch that load them."""

from __future__ import annotations

import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raydfkd import __version__
from raydfkd.config.schema import StudentSpec, TeacherSpec
from raydfkd.errors import RecipeError
from raydfkd.export.standalone import standalone_source
from raydfkd.export.student import SavedStudent
from raydfkd.networks.answers import AnswerScale, AnswersLogits, adapter_of
from raydfkd.networks.build import NETWORKS, as_module
from raydfkd.networks.pruned import pruned_teacher
from raydfkd.networks.weights import save_bytes

WEIGHTS = "student.safetensors"
_LOADER = Path(__file__).with_name("load.py")


def write_plain(student: SavedStudent, folder: Path) -> dict[str, Any]:
    """Write ``student.safetensors``, ``config.json``, ``network.py`` and ``load.py``; load them again and compare.

    Raises:
        RecipeError: the network cannot be built without raydfkd, or does not answer as the student.
    """
    (folder / WEIGHTS).write_bytes(save_bytes(student.network, {"format": "pt", "digest": student.digest}))
    (folder / "config.json").write_text(json.dumps(_configuration(student), indent=2, ensure_ascii=False) + "\n")
    (folder / "network.py").write_text(network_source(student))
    (folder / "load.py").write_text(_LOADER.read_text())
    network = runpy.run_path(str(folder / "network.py"))["build"]()
    network.load_state_dict(student.network.state_dict())
    logits = student.answer(network.eval(), student.normalised)
    return {"max_abs_difference": student.compare("safetensors", logits)}


def own_module(student: SavedStudent) -> str | None:
    """The user's module that ``network.py`` imports; None where it imports libraries only."""
    family, colon, _ = as_module(_whole(student).network).partition(":")
    return family if colon and family not in ("torchvision", "timm", "hf", "torchhub") else None


def _whole(student: SavedStudent) -> TeacherSpec | StudentSpec:
    """The network as somebody has written it: the student's, or the teacher's where the student is that, pruned."""
    recipe = student.recipe
    return recipe.teacher if student.is_pruned else recipe.student


def _configuration(student: SavedStudent) -> dict[str, Any]:
    spec, space = student.recipe.student, student.recipe.teacher.image_space
    return {
        "network": {"name": spec.network, "options": spec.options, "module": own_module(student)},
        "image_space": {
            "channels": space.channels,
            "height": space.height,
            "width": space.width,
            "mean": space.mean,
            "std": space.std,
            "input": "(images in [0, 1] - mean) / std, float32 [N, C, H, W]",
        },
        "class_names": student.class_names,
        "answers": "logits [N, K]; their softmax are probabilities",
        "digest": student.digest,
        "raydfkd": __version__,
    }


def network_source(student: SavedStudent) -> str:
    """The source of a module whose ``build`` makes the student's network without raydfkd.

    Raises:
        RecipeError: no library or module makes it.
    """
    made_by, imports, call = _construction(student)
    members = [*made_by, *([AnswersLogits, AnswerScale] if _needs_adapter(student) else [])]
    more, definitions = standalone_source(*members)
    build = ["def build():", '    """The network with fresh weights; it answers logits [N, K]."""']
    adapter = adapter_of(student.network)
    if _needs_adapter(student) and adapter is not None:
        hook = f"AnswersLogits(classes={adapter.classes}, scale={adapter.scale})"
        build += [f"    network = {call}", f"    network.register_forward_hook({hook})", "    return network"]
    else:
        build.append(f"    return {call}")
    head = [
        '"""The network of the student; written by raydfkd, Apache-2.0."""',
        "",
        "from __future__ import annotations",
        "",
    ]
    top = "\n".join([*head, *sorted({*imports, *more}, key=lambda line: (" = " in line, line))])
    return "\n\n\n".join([top, *definitions, "\n".join(build)]) + "\n"


def _construction(student: SavedStudent) -> tuple[list[Any], list[str], str]:
    """Classes and functions of ours whose source is needed, imports, and the call that makes the network."""
    made_by, imports, call = _construction_of(_whole(student), student)
    spec, teacher = student.recipe.student, student.recipe.teacher
    if not student.is_pruned:
        return made_by, imports, call
    given = ", ".join([call, str(teacher.classes), str(teacher.image_space.shape), *_keywords(spec.options)])
    return [*made_by, pruned_teacher], imports, f"{pruned_teacher.__name__}({given})"


def _construction_of(spec: TeacherSpec | StudentSpec, student: SavedStudent) -> tuple[list[Any], list[str], str]:
    teacher = student.recipe.teacher
    name = as_module(spec.network)
    family, colon, member = name.partition(":")
    counts = {"num_classes": teacher.classes}
    if not colon:
        factory = NETWORKS.get(name, where="student.network")
        sizes = f"{teacher.classes}, {teacher.image_space.channels}"
        return [factory], [], f"{factory.__name__}({', '.join([sizes, *_keywords(spec.options)])})"
    if family == "torchvision":
        given = _keywords({**counts, **spec.options})
        return [], ["from torchvision import models"], f"models.get_model({', '.join([repr(member), *given])})"
    if family == "timm":
        given = _keywords({**counts, "in_chans": teacher.image_space.channels, **spec.options})
        return [], ["import timm"], f"timm.create_model({', '.join([repr(member), *given])})"
    if family == "hf":
        return _from_configuration(student)
    if family == "torchhub":
        repository, _, entry = member.rpartition(":")
        source = "local" if Path(repository).is_dir() else "github"
        how = [f"source={source!r}", "trust_repo=True"]
        given = [repr(repository), repr(entry), *how, *_keywords(spec.options)]
        return [], ["import torch"], f"torch.hub.load({', '.join(given)})"
    if family in ("torchscript", "export"):
        raise RecipeError(
            f"--format safetensors: student.network is {spec.network!r}, an archive whose code no library has; use "
            "torch_export or onnx"
        )
    return [], ["import pkgutil"], f"pkgutil.resolve_name({name!r})({', '.join(_keywords(spec.options))})"


def _from_configuration(student: SavedStudent) -> tuple[list[Any], list[str], str]:
    network: Any = student.network
    configuration = network.config.to_diff_dict()
    options = _keywords({key: value for key, value in configuration.items() if key != "model_type"})
    made = f"AutoConfig.for_model({', '.join([repr(configuration['model_type']), *options])})"
    imports = ["from transformers import AutoConfig, AutoModelForImageClassification"]
    return [], imports, f"AutoModelForImageClassification.from_config({made})"


def _keywords(options: Mapping[str, Any]) -> list[str]:
    """Arguments of a call as source; a name that is none cannot become code."""
    named = {key: value for key, value in options.items() if key.isidentifier()}
    rest = {key: value for key, value in options.items() if key not in named}
    return [*(f"{key}={value!r}" for key, value in named.items()), *([f"**{rest!r}"] if rest else [])]


def _needs_adapter(student: SavedStudent) -> bool:
    """Whether the network by itself answers anything but logits."""
    with torch.no_grad():
        raw = student.network.forward(student.normalised)
    return not (isinstance(raw, Tensor) and torch.equal(raw, student.logits))
