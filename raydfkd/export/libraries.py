"""Students of timm and of transformers in the form in which their libraries save them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from raydfkd.errors import RecipeError
from raydfkd.export.student import SavedStudent


def is_timm(student: SavedStudent) -> bool:
    """Whether timm makes the network."""
    network = student.network
    return not student.is_pruned and hasattr(network, "pretrained_cfg") and hasattr(network, "num_classes")


def is_transformers(student: SavedStudent) -> bool:
    """Whether transformers makes the network."""
    kinds = type(student.network).__mro__
    return not student.is_pruned and any(kind.__module__.startswith("transformers.") for kind in kinds)


def write_timm(student: SavedStudent, folder: Path) -> dict[str, Any]:
    """Write what ``timm.create_model('local-dir:FOLDER')`` reads and ``push_to_hf_hub`` publishes; load and compare.

    Raises:
        RecipeError: it is no model of timm's, or what timm reads answers otherwise.
    """
    if not is_timm(student):
        raise _refusal(student, "timm")
    timm = importlib.import_module("timm")
    space = student.recipe.teacher.image_space
    picture = {"input_size": space.shape, "mean": space.mean, "std": space.std, "crop_pct": 1.0}
    configuration = {"pretrained_cfg": picture, "label_names": student.class_names}
    timm.models.save_for_hf(student.network, str(folder), model_config=configuration, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return {"max_abs_difference": student.compare("timm", student.answer(loaded, student.normalised))}


def write_hf(student: SavedStudent, folder: Path) -> dict[str, Any]:
    """Write what ``AutoModelForImageClassification.from_pretrained(FOLDER)`` reads; load it again and compare.

    Raises:
        RecipeError: it is no model of transformers, or what transformers reads answers otherwise.
    """
    network: Any = student.network
    if not is_transformers(student):
        raise _refusal(student, "hf")
    transformers = importlib.import_module("transformers")
    network.config.id2label = dict(enumerate(student.class_names))
    network.config.label2id = {name: label for label, name in enumerate(student.class_names)}
    with _no_progress_bars(transformers.utils.logging):
        network.save_pretrained(folder)
        loaded = type(network).from_pretrained(folder).eval()
    space = student.recipe.teacher.image_space
    transformers.ViTImageProcessor(
        size={"height": space.height, "width": space.width},
        image_mean=list(space.mean),
        image_std=list(space.std),
        do_convert_rgb=space.channels == 3,
    ).save_pretrained(folder)
    with torch.no_grad():
        logits = loaded(student.normalised).logits
    return {"max_abs_difference": student.compare("hf", logits)}


@contextlib.contextmanager
def _no_progress_bars(logging: Any) -> Iterator[None]:
    """Standard error is for what goes wrong."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _refusal(student: SavedStudent, form: str) -> RecipeError:
    library = {"timm": "timm", "hf": "transformers"}[form]
    network = f"{student.recipe.student.network} is {type(student.network).__name__}"
    return RecipeError(f"--format is {form}, but student.network {network}, no model of {library}; use safetensors")
