"""Forms of a student: which there are, and a folder of them with a model card."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raydfkd.config.recipe import Recipe
from raydfkd.export.card import model_card
from raydfkd.export.graphs import write_onnx, write_torch_export
from raydfkd.export.libraries import write_hf, write_timm
from raydfkd.export.plain import write_plain
from raydfkd.export.student import SavedStudent, open_student
from raydfkd.store.store import Store

Writer = Callable[[SavedStudent, Path], dict[str, Any]]
FORMS: Mapping[str, Writer] = {
    "safetensors": write_plain,
    "onnx": write_onnx,
    "torch_export": write_torch_export,
    "timm": write_timm,
    "hf": write_hf,
}
"""Writers by format. Each writes into a folder, compares what it wrote with the student and returns what it found."""
OWN_FOLDER = frozenset({"timm", "hf"})
"""Formats whose libraries name their files themselves; these get a folder below."""


def export_student(recipe: Recipe, to: str, formats: Sequence[str]) -> dict[str, Any]:
    """Write the student of a run in each of ``formats``, and a model card, to a folder or URI.

    All are made and compared with the student before the first file is written; each file is written whole or not at
    all. Returns the place, the files, and for each format what was found, ``max_abs_difference`` among it.

    Raises:
        RecipeError: there is no student, it has no such form, or a form of it answers otherwise.
    """
    student = open_student(recipe)
    store = Store(to)
    store.probe("--to", once=False)
    with tempfile.TemporaryDirectory() as scratch:
        found = {form: FORMS[form](student, _folder(Path(scratch), form)) for form in formats}
        (Path(scratch) / "README.md").write_text(model_card(student, found), encoding="utf-8")
        files = sorted(path for path in Path(scratch).rglob("*") if path.is_file())
        names = [path.relative_to(scratch).as_posix() for path in files]
        for name, path in zip(names, files, strict=True):
            store.put(name, path.read_bytes())
    return {"folder": store.uri, "files": names, "formats": found}


def _folder(scratch: Path, form: str) -> Path:
    folder = scratch / form if form in OWN_FOLDER else scratch
    folder.mkdir(exist_ok=True)
    return folder
