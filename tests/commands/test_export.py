"""What `raydfkd export` takes and says; what it writes is looked at in tests/export."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from toy import toy_recipe

import raydfkd
from raydfkd.cli import main
from raydfkd.commands.export import Form
from raydfkd.export.forms import FORMS

NAMES = "[cat, dog, horse, bird]"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run that was moved since."""
    folder = tmp_path_factory.mktemp("finished")
    raydfkd.run(toy_recipe(folder, ["distill.steps=2", f"teacher.class_names={NAMES}"]))
    shutil.move(folder / "run", folder / "moved")
    return folder


def answered(folder, *arguments):
    """Exit code, standard output and standard error of a command in ``folder``."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["raydfkd", "export", *arguments])
        patch.setattr(sys, "path", [*sys.path])
        with pytest.raises(SystemExit) as end:
            main()
    return end.value.code, out.getvalue(), err.getvalue()


def test_every_form_of_a_student_can_be_asked_for():
    assert [form.value for form in Form] == list(FORMS)


def test_student_of_a_run_that_was_moved_is_written_beside_it_in_all_forms_that_are_asked_for(finished):
    code, out, err = answered(finished, "student", "moved", "--format", "safetensors", "--format", "torch_export")
    assert (code, err) == (0, "")
    names = {path.name for path in (finished / "moved/export").iterdir()}
    assert names == {"README.md", "config.json", "load.py", "network.py", "student.pt2", "student.safetensors"}
    assert "safetensors   logits differ by at most 0" in out
    assert json.loads((finished / "moved/export/config.json").read_text())["class_names"][1] == "dog"
    assert "agreement with the teacher" in (finished / "moved/export/README.md").read_text()


def test_set_of_a_run_that_was_moved_is_written_beside_it(finished):
    code, out, err = answered(finished, "set", "moved", "--format", "folder", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"folder": str(finished / "moved/export/set"), "images": 24, "files": 25}
    assert len(list((finished / "moved/export/set/dog").iterdir())) == 6


def test_set_is_exported_by_its_place_alone_where_that_is_said_to_go(finished):
    assert answered(finished, "set", "moved/transfer_set") == (
        2,
        "",
        "--to is missing; say where to write the pictures of moved/transfer_set\n",
    )
    code, out, _ = answered(finished, "set", "moved/transfer_set", "--to", "out")
    assert (code, out) == (0, f"24 images in 2 files   {finished / 'out'}\n")
    assert (finished / "out/data/train-00000-of-00001.parquet").is_file()


def test_folder_of_something_else_is_refused_with_what_would_be_taken(finished):
    code, _, err = answered(finished, "student", ".")
    assert (code, err) == (2, ".: a folder without recipe.yaml; give the run_dir of a run, or a recipe\n")


def test_recipe_that_was_not_run_has_nothing_to_hand_out(tmp_path):
    recipe = str(Path(tmp_path, "toy.yaml"))
    toy_recipe(tmp_path)
    settings = ("--set", "teacher.weights=teacher.safetensors")
    code, _, err = answered(tmp_path, "student", recipe, *settings)
    assert (code, err) == (2, "run_dir is 'runs/toy': there is no student yet; `raydfkd run` or `distill` makes it\n")
    code, _, err = answered(tmp_path, "set", recipe, *settings)
    assert code == 2
    assert "there is no transfer set, for it has no set.json; `raydfkd synthesize` makes one" in err
