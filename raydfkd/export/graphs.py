"""The student as one graph from images in [0, 1] to logits, for any number of images: ONNX and torch.export."""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from raydfkd.config.schema import ImageSpace
from raydfkd.errors import RecipeError, one_line
from raydfkd.export.student import SavedStudent


class FromPictures(nn.Module):
    """A network that takes images in [0, 1], [N, C, H, W]: normalisation is its first step."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, space: ImageSpace) -> None:
        super().__init__()
        self.network = network
        for name, values in (("mean", space.mean), ("std", space.std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1] to logits [N, K]."""
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits


def write_torch_export(student: SavedStudent, folder: Path) -> dict[str, Any]:
    """Write ``student.pt2``, load it again and compare.

    Raises:
        RecipeError: the network cannot be made one graph, or the graph answers otherwise.
    """
    file = folder / "student.pt2"
    torch.export.save(_graph(student, "torch_export"), file)
    return _compared(student, "torch_export", torch.export.load(file).module())


def write_onnx(student: SavedStudent, folder: Path) -> dict[str, Any]:
    """Write ``student.onnx``, input ``images``, output ``logits``; run it by onnxruntime and compare.

    Raises:
        RecipeError: a package is missing, the network has no such form, or the graph answers otherwise.
    """
    onnxruntime = _packages("onnx", "onnxscript", "onnxruntime")
    program, file = _graph(student, "onnx"), folder / "student.onnx"
    with _one_line(student, "onnx"):
        made = torch.onnx.export(program, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False)
        assert made is not None, "dynamo=True returns a program"
        made.save(file)
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def answer(images: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        return torch.from_numpy(logits)

    return {**_compared(student, "onnx", answer), "opset": made.model.opset_imports[""]}


def _graph(student: SavedStudent, form: str) -> ExportedProgram:
    """The student as a graph whose batch has any size."""
    module = FromPictures(student.network, student.recipe.teacher.image_space).eval()
    batch = {"images": {0: Dim("batch", min=1)}}
    with _one_line(student, form):
        return torch.export.export(module, (student.images,), dynamic_shapes=batch)


def _compared(student: SavedStudent, form: str, answer: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """How far the form's logits are from the student's, asked all at once; a batch of one has to work as well."""
    with _one_line(student, form), torch.no_grad():
        logits = answer(student.images)
        single = answer(student.images[:1])
    student.compare(form, torch.cat([single, logits[1:]]))
    return {"max_abs_difference": student.compare(form, logits)}


@contextlib.contextmanager
def _one_line(student: SavedStudent, form: str) -> Iterator[None]:
    """Exporters and runtimes say much, and their errors are of any kind."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise RecipeError(
            f"--format {form}: {student.recipe.student.network} cannot be exported ({one_line(error)[:300]}); "
            "use safetensors"
        ) from error
    finally:
        logging.disable(before)


def _packages(*names: str) -> Any:
    """The last of the packages, all of which are needed."""
    try:
        return [importlib.import_module(name) for name in names][-1]
    except ImportError as error:
        raise RecipeError(
            f"--format onnx needs {error.name}, which is not installed; pip install 'raydfkd[onnx]'"
        ) from None
