from __future__ import annotations

import contextlib
import html
import io
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
import safetensors.torch
import torch
from picture_files import BROKEN, write_pictures
from PIL import Image
from toy import FAMILIES, shipped

from raydfkd.cli import main
from raydfkd.config.families import BESIDE
from raydfkd.config.load import load_recipe, packaged_recipes
from raydfkd.data.transfer_set import TransferSet
from raydfkd.devices import device_name
from raydfkd.store.errors import StoreError
from raydfkd.synthesis.worker import SynthesisWorker

TOY = """
recipe: digits-generators
name: toy
run_dir: out
teacher:
  options: {widths: [4, 8]}
  image_space: {size: 8}
  train: {epochs: 1, batch_size: 256}
student: {options: {widths: [4]}}
synthesis:
  steps: 4
  batch_per_class: 2
  emissions: 1
  generator: {latent: 4, width: 4, doublings: 1}
transfer_set:
  images_per_class: 4
  unit: {images_per_class: 2}
distill:
  steps: 3
  batch_size: 8
  source: {wait_for: 1}
runtime: {device: cpu}
"""
UNITS = ("r000-c0000-0009", "r001-c0000-0009")
NO_BATCHNORM = ("teacher.network=lenet5", "teacher.options={}", "teacher.image_space.size=32")
NO_TRAINING = "teacher.train=null"
CUDA_HERE = ("runtime.device=cuda", "runtime.executor=local")
RANDOM = ("teacher.weights=random", NO_TRAINING)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a command left in the terminal."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out.splitlines()[-1])


@dataclass(frozen=True)
class Terminal:
    """Runs commands in a folder that holds ``toy.yaml``, in this process."""

    folder: Path

    def __call__(self, *args):
        out, err = io.StringIO(), io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            patch.setattr(sys, "argv", ["raydfkd", *args])
            patch.setattr(sys, "path", [*sys.path])
            with pytest.raises(SystemExit) as stop:
                main()
        return Answer(code=stop.value.code, out=out.getvalue(), err=err.getvalue())

    def run(self, *overrides, command="run"):
        """Run the toy here and now."""
        return self(command, "toy.yaml", "--on", "local", "--json", *sets(*overrides))

    def files(self):
        """Everything in the folder but what Python keeps of an imported module, and when it was written."""
        paths = (path for path in self.folder.rglob("*") if "__pycache__" not in path.parts)
        return {path: path.stat().st_mtime_ns if path.is_file() else None for path in paths}


def sets(*overrides):
    return [part for override in overrides for part in ("--set", override)]


def new_terminal(folder):
    (folder / "toy.yaml").write_text(TOY)
    return Terminal(folder)


@pytest.fixture
def raydfkd(tmp_path):
    return new_terminal(tmp_path)


@pytest.fixture(scope="module")
def _finished(tmp_path_factory):
    terminal = new_terminal(tmp_path_factory.mktemp("finished"))
    answer = terminal.run()
    assert answer.code == 0, answer.err
    return terminal, answer


@pytest.fixture
def finished(_finished, tmp_path):
    """A terminal in a copy of the folder of a finished run, and that run's report."""
    terminal, answer = _finished
    folder = tmp_path / "copy"
    shutil.copytree(terminal.folder, folder)
    return Terminal(folder), answer.json


@contextlib.contextmanager
def raising_at(name, error):
    """Whenever the worker comes to the unit of that name, ``error`` is raised."""
    work = SynthesisWorker.run

    def run(self, unit, attempt=1):
        if unit.id == name:
            raise error
        return work(self, unit, attempt)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SynthesisWorker, "run", run)
        yield


# A run


def test_run_reports_everything_that_scripts_rely_on(finished):
    _, report = finished
    assert report["recipe"]["name"] == "toy"
    assert report["seed"] == 0
    assert 0 <= report["teacher"]["top1"] <= 1
    assert 0 <= report["student"]["top1"] <= 1
    assert 0 <= report["agreement"] <= 1
    assert (report["judged_on"], report["judged_images"]) == ("real digits test images", 540)
    assert 0 <= report["intended_class"] <= 1
    assert 1 <= report["answered_classes"] <= 10
    assert all(isinstance(warning, str) for warning in report["warnings"])
    assert report["images"] == 40
    assert report["images_per_second"] > 0
    assert report["units"] == {"planned": 2, "committed": 2, "attempted": 2, "quarantined": 0}
    assert report["failures"] == []
    assert report["seconds"].keys() == {"total", "synthesis", "distillation"}
    assert report["seconds"]["total"] >= report["seconds"]["synthesis"] >= 0
    assert all(re.fullmatch("[0-9a-f]{64}", report[key]) for key in ("content_digest", "recipe_digest"))
    assert report["versions"].keys() >= {"raydfkd", "python", "torch", "torchvision", "ray", "pyarrow"}
    assert report["command"] == "raydfkd run toy.yaml --on local --json"
    assert report["device"] == device_name(torch.device("cpu"))


def test_run_leaves_report_student_and_transfer_set(finished):
    terminal, report = finished
    out = terminal.folder / "out"
    assert json.loads((out / "report.json").read_text()) == report
    assert "<html" in (out / "report.html").read_text()
    assert sorted(path.stem for path in (out / "transfer_set/commits").iterdir()) == list(UNITS)
    student = safetensors.torch.load_file(out / "student.safetensors")
    assert (
        sum(value.numel() for key, value in student.items() if "running" not in key and "num" not in key)
        == (report["student"]["parameters"])
    )


def test_run_says_on_standard_error_what_it_does(raydfkd):
    answer = raydfkd.run()
    assert answer.code == 0
    assert len(answer.out.splitlines()) == 1
    for said in ("trained on real digits", "no real image is read", "40 images in 2 units", "40/40 images", "step 3/3"):
        assert said in answer.err


def test_run_for_people_ends_with_a_table_and_where_to_look(raydfkd):
    answer = raydfkd("run", "toy.yaml", "--on", "local")
    assert answer.code == 0
    assert "agreement on 540 real digits test images" in answer.out
    assert answer.out.splitlines()[-2:] == ["report    out/report.html", "student   out/student.safetensors"]


JUDGED = (
    *("teacher", "student", "agreement", "judged_on", "judged_images", "class_names"),
    *("images_per_class", "confusion", "skipped_pictures"),
)


def test_evaluate_agrees_with_the_report(finished):
    terminal, report = finished
    answer = terminal("evaluate", "toy.yaml", "--json")
    assert answer.code == 0
    assert answer.json == {key: report[key] for key in JUDGED}


def test_evaluate_judges_other_weights_on_another_split(finished):
    terminal, report = finished
    (terminal.folder / "out/student.safetensors").rename(terminal.folder / "moved.safetensors")
    answer = terminal("evaluate", "toy.yaml", "--student", "moved.safetensors", "--split", "validation")
    assert answer.code == 0
    lines = dict(line.split(maxsplit=1) for line in answer.out.splitlines())
    assert set(lines) == {"teacher", "student", "agreement"}
    assert re.fullmatch(r"[\d.]+%   top-5 [\d.]+%   calibration error [\d.]+%", lines["student"])
    assert lines["agreement"].endswith("on 180 real digits validation images")


def test_evaluate_by_pictures_that_nobody_has_labelled_says_how_often_the_networks_agree(finished):
    terminal, _ = finished
    pictures = {"monday/photo.png": 10, "monday/again.png": 120, "photo.png": 250, "broken.jpg": BROKEN}
    write_pictures(terminal.folder / "photographs", pictures)
    answer = terminal("evaluate", "toy.yaml", "--pictures", "photographs", "--json")
    assert answer.code == 0
    assert (answer.json["judged_images"], answer.json["judged_on"]) == (3, "pictures without labels in photographs")
    assert answer.json["agreement"] in (0, 1 / 3, 2 / 3, 1)
    assert answer.json["teacher"]["top1"] is answer.json["student"]["top1"] is None
    assert answer.json["skipped_pictures"] == {"count": 1, "first": ["broken.jpg"]}
    lines = terminal("evaluate", "toy.yaml", "--pictures", "photographs").out.splitlines()
    assert [line.split()[0] for line in lines] == ["agreement", "warning"]


def test_evaluate_by_a_folder_without_a_picture_is_refused(finished):
    terminal, _ = finished
    write_pictures(terminal.folder / "texts", {"notes.txt": b"none"})
    answer = terminal("evaluate", "toy.yaml", "--pictures", "texts", "--student", "nowhere")  # before any network
    assert answer.code == 2
    assert "--pictures is 'texts': no picture in it or below; known are .bmp" in answer.err
    write_pictures(terminal.folder / "texts", {"notes.png": BROKEN})
    answer = terminal("evaluate", "toy.yaml", "--pictures", "texts")
    assert "--pictures is 'texts': none can be decoded, such as notes.png; give others" in answer.err
    answer = terminal("evaluate", "toy.yaml", "--pictures", "texts", "--split", "test")
    assert "--split is 'test', but --pictures has no splits; drop either" in answer.err


def test_same_command_goes_on_from_a_finished_run_without_making_an_image(finished):
    terminal, report = finished
    before = terminal.files()
    again = terminal.run()
    assert again.code == 0
    assert again.json == report, "figures are of all sessions"
    parts = [path for path in terminal.files() if path.suffix == ".parquet"]
    assert all(terminal.files()[path] == before[path] for path in parts)
    assert "2 of 2 units are there already" in again.err
    assert "resumes at step 3" in again.err


def test_longer_plan_makes_only_what_is_missing(finished):
    terminal, report = finished
    longer = terminal.run("transfer_set.images_per_class=6")
    assert longer.code == 0
    assert longer.json["units"] == {"planned": 3, "committed": 3, "attempted": 3, "quarantined": 0}
    assert longer.json["recipe_digest"] == report["recipe_digest"]
    assert longer.json["content_digest"] != report["content_digest"]


def test_another_student_learns_from_the_images_that_are_there(finished):
    terminal, report = finished
    other = terminal.run("student.options.widths=[6]")
    assert other.code == 0
    assert other.json["units"] == report["units"]
    assert other.json["seconds"]["synthesis"] == report["seconds"]["synthesis"]
    assert (
        "trains from the beginning, since another was asked for: student.options.widths is [4] there and [6] here"
        in other.err
    )
    assert other.json["content_digest"] == report["content_digest"]
    assert other.json["student"]["parameters"] > report["student"]["parameters"]


def test_report_writes_the_page_anew(finished):
    terminal, report = finished
    page = terminal.folder / "out/report.html"
    before = page.read_text()
    page.unlink()
    answer = terminal("report", "toy.yaml", "--json")
    assert answer.code == 0
    assert answer.json == report
    assert page.read_text() == before


def test_report_draws_all_its_pictures_as_one_png(finished):
    terminal, _ = finished
    assert terminal("report", "toy.yaml", "--png", "pictures/toy.png").code == 0
    with Image.open(terminal.folder / "pictures/toy.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.size == (4 * (2 * 8 + 2) + 2, 10 * (2 * 8 + 2) + 2), "4 of each of 10 classes, twice as large"
    answer = terminal("report", "toy.yaml", "--png", "pictures")
    assert (answer.code, answer.err) == (2, "Invalid value for '--png': file 'pictures' is a directory.\n")


def test_synthesizing_and_distilling_one_after_the_other_makes_the_same_student(finished, tmp_path):
    terminal, report = finished
    apart = new_terminal(tmp_path)
    made = apart.run(command="synthesize")
    assert made.code == 0
    assert (made.json["images"], made.json["units"]) == (40, "2/2")
    assert made.json["content_digest"] == report["content_digest"]
    taught = apart.run(command="distill")
    assert taught.code == 0
    assert taught.json == {"student": "out/student.safetensors", "images": 40, "student_images": 40}
    one, other = (safetensors.torch.load_file(t.folder / "out/student.safetensors") for t in (terminal, apart))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_teach_trains_the_teacher_anew_and_the_same_from_the_same_seed(raydfkd):
    first = raydfkd("teach", "toy.yaml", "--json")
    assert (first.code, first.json) == (0, {"weights": "out/teacher.safetensors"})
    weights = raydfkd.folder / "out/teacher.safetensors"
    before = weights.read_bytes()
    weights.unlink()
    assert raydfkd("teach", "toy.yaml").code == 0
    assert weights.read_bytes() == before
    assert raydfkd("teach", "toy.yaml", *sets("seed=1")).code == 0
    assert weights.read_bytes() != before


def test_run_with_some_classes_only_shows_those_in_its_report(raydfkd):
    answer = raydfkd.run("transfer_set.classes=[7, 2]", "transfer_set.unit.classes=2")
    assert (answer.code, answer.json["images"]) == (0, 8)
    assert "2 classes, 8 images" in answer.err
    page = (raydfkd.folder / "out/report.html").read_text()
    shown = re.findall(r"<h3>(\w+)</h3>", page)
    assert shown == ["7", "2"]


@pytest.mark.parametrize("synthesizer", ["generator", "pixels"])
@pytest.mark.parametrize("size", ["[8, 16]", "[16, 8]"])
def test_run_with_images_that_are_not_square_is_a_run_like_any_other(raydfkd, size, synthesizer):
    pixels = [
        "synthesis={synthesizer: pixels, batch_size: 20, stages: [{pool: 2, steps: 1}, {steps: 1}], "
        "objective: [cross_entropy, bn_moments, total_variation], augment: [{kind: affine, degrees: 9}]}"
    ]
    answer = raydfkd.run(f"teacher.image_space.size={size}", *(pixels if synthesizer == "pixels" else []))
    assert answer.code == 0, answer.err
    height, width = json.loads(size)
    place = raydfkd.folder / "out/transfer_set"
    made = TransferSet(str(place), digest=json.loads((place / "set.json").read_text())["digest"])
    assert made.read(made.snapshot().commits[0].parts[0]).images.shape[1:] == (1, height, width)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["synthesis.generator.doublings=4"],
            "doublings is 4, but image size [16, 8] is not divisible by 16; use at most 3",
        ),
        (NO_BATCHNORM[:2], "teacher.network lenet5 cannot take 1x16x8 images"),
    ],
)
def test_part_that_cannot_take_images_of_that_shape_is_named(raydfkd, overrides, message):
    answer = raydfkd("check", "toy.yaml", *sets("teacher.image_space.size=[16, 8]", *overrides))
    assert answer.code == 2
    assert message in answer.err


def test_nothing_that_is_made_is_called_tilde(raydfkd, monkeypatch):
    home = raydfkd.folder / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for overrides in (
        ["run_dir=~/a"],
        ["run_dir=b", "transfer_set.uri=~/b/set", "teacher.weights=~/b/teacher.safetensors"],
    ):
        answer = raydfkd("run", "toy.yaml", "--on", "local", *sets(*overrides))
        assert answer.code == 0, answer.err
    assert raydfkd("run", "toy.yaml", "--on", "local", "--run-dir", "~/c").code == 0
    for name in ("a", "c"):
        assert {"report.html", "report.json", "metrics.jsonl", "student.safetensors", "transfer_set"} <= {
            path.name for path in (home / name).iterdir()
        }
    assert {path.name for path in (home / "b").iterdir()} == {"set", "teacher.safetensors"}
    judged = raydfkd("evaluate", "toy.yaml", "--run-dir", "~/a", "--student", "~/c/student.safetensors", "--json")
    assert judged.code == 0, judged.err
    assert raydfkd("bench", "quality", "toy.yaml", "--out", "~/q", *sets("teacher.network=nosuch")).code == 2
    assert not [path for path in raydfkd.folder.rglob("*") if path.name.startswith("~")]


def test_run_dir_option_moves_everything(raydfkd):
    assert raydfkd.run(command="teach").code == 2, "teach has no --on"
    assert raydfkd("teach", "toy.yaml", "--run-dir", "elsewhere").code == 0
    assert (raydfkd.folder / "elsewhere/teacher.safetensors").is_file()
    assert not (raydfkd.folder / "out").exists()


# Checking and showing


def test_check_prints_the_resolved_recipe_which_is_a_recipe(raydfkd):
    before = raydfkd.files()
    answer = raydfkd("check", "toy.yaml", *sets("seed=3", "synthesis.objective.bn_moments.weight=1e-4"))
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.splitlines()[-1] == "# sound: 2 units, 40 images"
    assert raydfkd.files() == before, "check writes nothing"
    resolved = raydfkd.folder / "resolved.yaml"
    resolved.write_text(answer.out)
    overrides = ["seed=3", "synthesis.objective.bn_moments.weight=1e-4"]
    assert load_recipe(resolved) == load_recipe(raydfkd.folder / "toy.yaml", overrides)
    again = raydfkd("check", "resolved.yaml")
    assert again.out == answer.out


def test_check_prints_json_which_is_a_recipe_too(raydfkd):
    answer = raydfkd("check", "toy.yaml", "--json")
    assert answer.json["name"] == "toy"
    (raydfkd.folder / "resolved.yaml").write_text(answer.out)
    assert load_recipe(raydfkd.folder / "resolved.yaml") == load_recipe(raydfkd.folder / "toy.yaml")


NO_CODE = (
    "# sound: 2 units, 40 images; networks, code of yours, weights, names of classes, real data, stores and the device "
    "were not looked at"
)


def test_check_without_code_prints_the_same_and_says_what_it_did_not_look_at(raydfkd):
    answer = raydfkd("check", "toy.yaml", "--no-code")
    assert (answer.code, answer.err) == (0, "")
    *resolved, networks, methods, sound = raydfkd("check", "toy.yaml").out.splitlines()
    assert networks.startswith("# student of ")
    assert methods == "# which methods suit the teacher, and why others do not: raydfkd show --for RECIPE"
    assert answer.out.splitlines() == [*resolved, NO_CODE]
    assert sound == NO_CODE.partition(";")[0]


def test_check_says_how_much_there_will_be_of_what(raydfkd):
    lines = raydfkd("check", "toy.yaml").out.splitlines()[-4:-2]
    student, teacher = 1 * 9 * 4 + 2 * 4 + 10 * 5, 1 * 9 * 4 + 2 * 4 + 4 * 9 * 8 + 2 * 8 + 10 * 9
    assert lines == [
        f"# 10 classes, 40 images of 1x8x8: {40 * (64 + 20 + 28) / 1024:.3g} KiB of pixels and logits",
        f"# student of {student} parameters, teacher of {teacher}: the student is {student / teacher:.1%} of it",
    ]


def test_check_counts_the_classes_that_were_chosen(raydfkd):
    some = sets("transfer_set.classes=[3, 5]", "transfer_set.unit.classes=2", "transfer_set.encoding=png")
    line = raydfkd("check", "toy.yaml", *some).out.splitlines()[-4]
    assert line.startswith("# 2 classes, 8 images of 1x8x8: ")
    assert line.endswith(" of pixels and logits before they are png, which takes less")


def test_check_says_that_a_student_is_larger_than_its_teacher(raydfkd):
    answer = raydfkd("check", "toy.yaml", *sets("student.options.widths=[40, 40]"))
    assert answer.code == 0
    assert "times as large as what it is to replace" in answer.out.splitlines()[-3]


def test_check_finds_independent_mistakes_at_once(raydfkd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    mistakes = [*CUDA_HERE, "teacher.class_names=nowhere.txt", "teacher.weights=nowhere.pt", NO_TRAINING]
    answer = raydfkd("check", "toy.yaml", *sets(*mistakes))
    assert answer.code == 2
    assert [line.partition(" ")[0] for line in answer.err.splitlines()] == [
        "runtime.device",
        "teacher.class_names",
        "teacher.weights",
    ]


def test_run_with_a_wrong_file_of_class_names_is_refused_before_any_work(raydfkd):
    before = raydfkd.files()
    answer = raydfkd.run("teacher.class_names=nowhere.txt", "teacher.weights=nowhere.pt", NO_TRAINING)
    assert answer.code == 2
    assert [line.partition(" ")[0] for line in answer.err.splitlines()] == ["teacher.class_names", "teacher.weights"]
    assert raydfkd.files() == before


def test_device_of_another_machine_is_named_with_the_way_to_check_a_recipe_for_it(raydfkd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = raydfkd.files()
    refusal = "runtime.device is 'cuda', but this machine has no CUDA device; use auto or cpu"
    answer = raydfkd("check", "toy.yaml", "--on", "local", *sets("runtime.device=cuda"))
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == f"{refusal}, or check with --no-code what is for another machine\n"
    assert raydfkd("run", "toy.yaml", *sets(*CUDA_HERE)).err == f"{refusal}\n"
    assert raydfkd.files() == before
    assert raydfkd("check", "toy.yaml", "--no-code", *sets(*CUDA_HERE)).code == 0


def test_device_of_the_workers_is_not_asked_of_the_machine_that_drives_them(raydfkd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpus = ("runtime.gpus_per_worker=1", "runtime.gpus_per_student_worker=0.5")
    answer = raydfkd("check", "toy.yaml", *sets("runtime.device=cuda", *gpus))
    assert (answer.code, answer.err) == (0, "")
    assert "device: cuda" in answer.out


@pytest.mark.parametrize("key", ["gpus_per_worker", "gpus_per_student_worker"])
def test_cuda_for_workers_that_reserve_no_gpu_is_refused_by_name(raydfkd, key):
    gpus = {"gpus_per_worker": 1, "gpus_per_student_worker": 1} | {key: 0}
    overrides = ["runtime.device=cuda", *(f"runtime.{name}={share}" for name, share in gpus.items())]
    answer = raydfkd("check", "toy.yaml", "--no-code", *sets(*overrides))
    assert (answer.code, answer.err) == (
        2,
        f'runtime.{key} is 0, but runtime.device is "cuda"; reserve a GPU or a share of one, such as 0.5, or use auto, '
        "which takes the CPU there\n",
    )


def test_check_without_code_prints_the_same_json(raydfkd):
    assert raydfkd("check", "toy.yaml", "--no-code", "--json").out == raydfkd("check", "toy.yaml", "--json").out


def test_check_without_code_imports_nothing_that_the_recipe_names(raydfkd):
    (raydfkd.folder / "crater.py").write_text("import os; os.mkdir('crater')")
    before = raydfkd.files()
    stranger = sets("teacher.network=crater:build", "student.network=crater:build", "real_data=null", NO_TRAINING)
    answer = raydfkd("check", "toy.yaml", "--no-code", *stranger)
    assert (answer.code, answer.out.splitlines()[-1]) == (0, NO_CODE)
    assert raydfkd.files() == before
    assert raydfkd("check", "toy.yaml", *stranger).code == 2
    assert (raydfkd.folder / "crater").exists(), "with code the check imports it, so the test means something"


def test_check_without_code_opens_no_file_that_the_recipe_names(raydfkd):
    elsewhere = sets("teacher.weights=nosuch://a/b.pt", "transfer_set.uri=nosuch://bucket/set", NO_TRAINING)
    answer = raydfkd("check", "toy.yaml", "--no-code", *elsewhere)
    assert (answer.code, answer.out.splitlines()[-1]) == (0, NO_CODE)


def test_show_lists_every_recipe_family_and_plugin(raydfkd):
    answer = raydfkd("show")
    assert answer.code == 0
    lines = [line.strip() for line in answer.out.splitlines()]
    assert {"recipes", *FAMILIES} <= set(lines)
    words = {line.partition(" ")[0] for line in lines}
    assert {*packaged_recipes(), *(name for family in FAMILIES.values() for name in shipped(family))} <= words


@pytest.mark.parametrize("family", FAMILIES)
def test_show_lists_one_family(raydfkd, family):
    lines = raydfkd("show", family).out.splitlines()
    assert lines[0] == family
    beside = {form for form, _ in BESIDE.get(family, ())}
    own = [line for line in lines[1:] if line.startswith("  ") and line[2] != " "]
    assert {line.split()[0] for line in own} == {*shipped(FAMILIES[family]), *beside}


def test_show_says_that_a_network_may_be_code_and_how_to_look_at_a_recipe_without_running_it(raydfkd):
    (line,) = [line for line in raydfkd("show", "networks").out.splitlines() if "module:Class" in line]
    assert "Code of yours, which runs" in line
    assert "check --no-code" in line


def test_show_explains_a_plugin_and_its_options(raydfkd):
    lines = raydfkd("show", "bn_moments").out.splitlines()
    assert lines[0].split()[0] == "bn_moments"
    assert any("free of scale" in line for line in lines), "the whole docstring"
    options = {line.split()[0]: line for line in lines if line.endswith("]")}
    assert options.keys() == {"form", "statistic", "scope", "momentum", "first_layer_scale"}
    assert "norm, squared, kl or reverse_kl." in options["form"]
    assert 'default "norm"]' in options["form"]


@pytest.mark.parametrize("name", packaged_recipes())
def test_show_prints_a_recipe_as_it_is(raydfkd, name):
    shown = raydfkd("show", name).out
    (raydfkd.folder / "shown.yaml").write_text(shown)
    assert load_recipe(raydfkd.folder / "shown.yaml") == load_recipe(name)
    assert shown.partition("\n")[0].lstrip("# ") in raydfkd("show", "recipes").out


def test_show_of_a_misspelled_name_suggests_the_closest_one(raydfkd):
    answer = raydfkd("show", "bn_momets")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == "there is nothing called 'bn_momets'; did you mean bn_moments?\n"


# The transfer set


def test_verify_of_a_finished_run_finds_every_image(finished):
    terminal, _ = finished
    answer = terminal("verify", "toy.yaml")
    assert (answer.code, answer.out) == (0, "2 of 2 units are there and whole, 40 images; 0 damaged\n")
    found = {"units": 2, "planned": 2, "beyond": 0, "images": 40, "damaged": {}}
    assert terminal("verify", "toy.yaml", "--json").json == found


def test_verify_of_a_shorter_plan_counts_its_units_alone_and_reads_the_others_too(finished):
    terminal, _ = finished
    answer = terminal("verify", "toy.yaml", *sets("transfer_set.images_per_class=2"))
    assert (answer.code, answer.out) == (
        0,
        "1 of 1 units and 1 beyond this plan are there and whole, 40 images; 0 damaged\n",
    )


def test_verify_sets_a_damaged_unit_aside_and_the_same_run_makes_it_again(finished, caplog):
    terminal, report = finished
    damaged = next((terminal.folder / "out/transfer_set/parts").glob(f"{UNITS[1]}-*"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    answer = terminal("verify", "toy.yaml", "--json")
    assert answer.code == 1
    assert (answer.json["units"], answer.json["images"], list(answer.json["damaged"])) == (1, 20, [UNITS[1]])
    assert answer.err.startswith(f"unit {UNITS[1]}: ")
    assert answer.err.count("\n") == 1
    assert not caplog.records, "the same damage once more"
    again = terminal.run()
    assert again.code == 0
    assert again.json["content_digest"] == report["content_digest"]


def test_gc_removes_what_nobody_reads_once_it_is_old(finished):
    terminal, report = finished
    orphan = terminal.folder / f"out/transfer_set/parts/{UNITS[0]}-7-0123abcd-0000.parquet"
    orphan.write_bytes(bytes(2**20))
    assert terminal("gc", "toy.yaml", "--json").json["paths"] == [], "it is young"
    os.utime(orphan, (0, 0))
    looked = terminal("gc", "toy.yaml", "--dry-run")
    assert looked.out.splitlines()[0] == f"parts/{orphan.name}"
    assert orphan.exists()
    answer = terminal("gc", "toy.yaml")
    assert (answer.code, answer.out) == (0, "1 objects, 1.0 MiB removed from out/transfer_set\n")
    assert not orphan.exists()
    assert terminal.run().json["content_digest"] == report["content_digest"]


# Wrong input


@pytest.fixture
def cluttered(raydfkd):
    """A terminal in a folder with things that are not what a recipe may take them for."""
    folder = raydfkd.folder
    torch.save(torch.nn.Linear(2, 2).state_dict(), folder / "other.pt")
    (folder / "text.safetensors").write_text("not weights")
    (folder / "code.pt").write_bytes(pickle.dumps(Crater(str(folder / "crater")), protocol=2))
    (folder / "file").write_text("in the way")
    (folder / "list.yaml").write_text("- a\n")
    (folder / "twice.yaml").write_text("name: a\nname: b\n")
    (folder / "users_own.py").write_text(USERS_OWN)
    return raydfkd


USERS_OWN = """
import torch

def nothing():
    return 3

class Constant(torch.nn.Module):
    def forward(self, images):
        return images.new_zeros(len(images), 10)
"""


@dataclass
class Crater:
    """Makes a folder when it is unpickled."""

    path: str

    def __reduce__(self):
        return os.mkdir, (self.path,)


WRONG = {
    "unknown key": (["sed=1"], "sed: unknown key; did you mean seed?"),
    "misspelled key of a section": (["teacher.clases=4"], "teacher.clases: unknown key; did you mean classes?"),
    "value of the wrong type": (["distill.steps=many"], 'distill.steps is "many": input should be a valid integer'),
    "value out of range": (["distill.optimizer.lr=-1"], "distill.optimizer.lr is -1: input should be greater than 0"),
    "override without a value": (["seed"], "--set seed: write it as key=value, such as seed=1"),
    "misspelled term": (
        ["synthesis.objective=[bn_momets]"],
        "synthesis.objective[0]: unknown term 'bn_momets'; did you mean bn_moments?",
    ),
    "misspelled option of a term": (
        ["synthesis.objective.bn_moments.fom=kl"],
        "synthesis.objective[1].fom: unknown key; did you mean form?",
    ),
    "wrong option of a term": (
        ["synthesis.objective.bn_moments.form=l1"],
        "synthesis.objective[1].form is \"l1\": input should be 'norm', 'squared', 'kl' or 'reverse_kl'",
    ),
    "weight that is no number": (
        ["synthesis.objective.bn_moments.weight=.nan"],
        "synthesis.objective.1.weight is NaN: input should be a finite number",
    ),
    "term without targets": (
        ["synthesis.targets=none"],
        "synthesis.objective[0]: cross_entropy needs targets, but targets is none; use `targets: balanced`",
    ),
    "misspelled synthesizer": (
        ["synthesis.synthesizer=generators"],
        "synthesis: unknown synthesizer 'generators'; did you mean generator?",
    ),
    "misspelled option of the synthesizer": (["synthesis.step=4"], "synthesis.step: unknown key; did you mean steps?"),
    "option of the synthesizer out of range": (
        ["synthesis.emissions=9"],
        "synthesis: emissions is 9, but half of 4 steps are fewer; use at most 2",
    ),
    "generator that does not fit": (
        ["synthesis.generator.doublings=4"],
        "synthesis.generator: doublings is 4, but image size 8 is not divisible by 16; use at most 3",
    ),
    "misspelled augmentation": (
        ["distill.augment=[jiter]"],
        "distill.augment[0]: unknown augmentation 'jiter'; did you mean jitter?",
    ),
    "misspelled augmentation of the teacher": (
        ["teacher.train.augment=[jiter]"],
        "teacher.train.augment[0]: unknown augmentation 'jiter'; did you mean jitter?",
    ),
    "misspelled criterion": (
        ["distill.criterion=soft_k"],
        "distill.criterion: unknown criterion 'soft_k'; did you mean soft_kl?",
    ),
    "misspelled network": (
        ["student.network=lenet"],
        "student.network: unknown network 'lenet'; did you mean lenet5?",
    ),
    "network that is no network": (
        ["student.network=users_own:nothing", "student.options={}"],
        "student.network: users_own:nothing returned int, not a torch.nn.Module",
    ),
    "network without weights": (
        ["student.network=users_own:Constant", "student.options={}"],
        "student.network has no weights that take a gradient; give one that can learn",
    ),
    "misspelled data set": (["real_data=digit"], "real_data: unknown real data set 'digit'; did you mean digits?"),
    "data set that is not there": (
        ["real_data={kind: fashion_mnist, root: nowhere}"],
        "real_data.root is 'nowhere': no train-images idx file there; apt-get install dataset-fashion-mnist, "
        "or set real_data.download=true",
    ),
    "missing weights": (
        [NO_TRAINING, "teacher.weights=no.pt"],
        "teacher.weights is 'no.pt': no such file; give trained weights, or teacher.train to train them",
    ),
    "weights of another network": (
        ["teacher.weights=other.pt"],
        "teacher.weights is 'other.pt': weights of another network (body.0.0.weight is missing, and weight is not in "
        "the network; 0 of the network's 12 tensors fit); check network and options",
    ),
    "no weights at all": (
        ["teacher.weights=text.safetensors"],
        "teacher.weights is 'text.safetensors': not a state dict of tensors; "
        "give a .safetensors file or torch.save(net.state_dict())",
    ),
    "code instead of weights": (
        ["teacher.weights=code.pt"],
        "teacher.weights is 'code.pt': not a state dict of tensors (it holds a pickled posix.mkdir, and code is never "
        "run); give a .safetensors file or torch.save(net.state_dict())",
    ),
    "weights that cannot be looked for": (
        ["teacher.weights=nosuch://a/b.pt"],
        "teacher.weights is 'nosuch://a/b.pt': cannot be read (Protocol not known: nosuch); "
        "give a file that this machine can read",
    ),
    "weights that could not be saved": (
        ["teacher.weights=file/teacher.pt"],
        "the folder of teacher.weights is {folder}/file: cannot be written ({folder}/file is a file); "
        "give a URI this machine can write to",
    ),
    "image size that the network cannot take": (
        [*NO_BATCHNORM, "teacher.image_space.size=16"],
        "teacher.image_space.size is 16, but teacher.network lenet5 cannot take 1x16x16 images (Calculated padded "
        "input size per channel: (1 x 1). Kernel size: (5 x 5). Kernel size can't be greater than actual input "
        "size); sizes that work: 32",
    ),
    "class count of another data set": (
        ["teacher.classes=11"],
        "teacher.classes is 11, but digits has 10 classes",
    ),
    "class out of range": (
        ["transfer_set.classes=[0, 10]", "transfer_set.unit.classes=2"],
        "transfer_set.classes has 10, which is twice there or not a class of the teacher; "
        "use each of 0 to 9 at most once",
    ),
    "broken units": (
        ["transfer_set.images_per_class=5"],
        "transfer_set: images_per_class 5 is not a multiple of unit.images_per_class 2; try 4 or 6",
    ),
    "unknown protocol": (
        ["transfer_set.uri=nosuch://bucket/set"],
        "transfer_set.uri is nosuch://bucket/set: cannot be written (Protocol not known: nosuch); "
        "give a URI this machine can write to",
    ),
    "unknown protocol and weights that are there": (
        ["transfer_set.uri=nosuch://bucket/set", "teacher.weights=random"],
        "transfer_set.uri is nosuch://bucket/set: cannot be written (Protocol not known: nosuch); "
        "give a URI this machine can write to",
    ),
    "file in the way of the transfer set": (
        ["transfer_set.uri=file/set", "teacher.weights=random"],
        "transfer_set.uri is {folder}/file/set: cannot be written ({folder}/file is a file); "
        "give a URI this machine can write to",
    ),
    "file in the way of the run": (
        ["run_dir=file", "transfer_set.uri=elsewhere", "teacher.weights=random"],
        "run_dir is {folder}/file: cannot be written ({folder}/file is a file); give a URI this machine can write to",
    ),
    "unknown placeholder": (
        ["transfer_set.uri=${run_dri}/set"],
        "transfer_set.uri is '${{run_dri}}/set': unknown placeholder; did you mean run_dir?",
    ),
}


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize(("overrides", "message"), WRONG.values(), ids=list(WRONG))
def test_wrong_input_gets_one_line_and_nothing_is_written(cluttered, monkeypatch, command, overrides, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = cluttered.files()
    answer = cluttered(command, "toy.yaml", *sets(*overrides))
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == message.format(folder=cluttered.folder) + "\n"
    assert cluttered.files() == before


@pytest.mark.parametrize("command", ["check", "run"])
def test_matching_moments_of_a_teacher_without_batchnorm_is_refused(cluttered, command):
    before = cluttered.files()
    answer = cluttered(command, "toy.yaml", *sets(*NO_BATCHNORM))
    assert (answer.code, answer.out) == (2, "")
    assert "needs BatchNorm layers with stored statistics, but the teacher has none; drop it" in answer.err
    assert answer.err.count("\n") == 1
    assert cluttered.files() == before


COMMANDS = ("check", "run", "teach", "synthesize", "distill", "evaluate", "report", "verify", "gc", "submit")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_misspelled_key(raydfkd, command):
    before = raydfkd.files()
    answer = raydfkd(command, "toy.yaml", *sets("studnt.network=convnet"))
    assert (answer.code, answer.out, answer.err) == (2, "", "studnt: unknown key; did you mean student?\n")
    assert raydfkd.files() == before


MEASURED = ("synthesis", "generators", "overlap", "student")


@pytest.mark.parametrize("name", MEASURED)
def test_benchmark_on_a_device_that_is_not_there_is_refused_by_the_name_of_its_option(raydfkd, monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    answer = raydfkd("bench", name, "--device", "cuda")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == "--device is 'cuda', but this machine has no CUDA device; use auto or cpu\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["rnu", "toy.yaml"], "No such command 'rnu'. Did you mean 'run'?"),
        (["run", "toy.yaml", "--run-dri", "x"], "No such option: --run-dri (Possible options: --run-dir)"),
        (["run"], "Missing argument 'RECIPE'."),
        (["run", "toi.yaml"], "toi.yaml: no such file; give a recipe file or one of: digits-"),
        (["run", "digit-generators"], "digit-generators: no such recipe; did you mean digits-generators?"),
        (["run", "list.yaml"], "list.yaml is not a recipe: the top of the file must be keys like `teacher:`"),
        (["run", "twice.yaml"], "name: given twice, again in line 2; keep one of them"),
        (["run", "other.pt"], "other.pt cannot be read as a recipe: it is not text"),
        (["run", "toy.yaml", "--on", "lokal"], "Invalid value for '--on': 'lokal' is not one of 'ray', 'local'."),
        (["evaluate", "toy.yaml", "--split", "tset"], "Invalid value for '--split': 'tset' is not one of "),
        (
            ["evaluate", "toy.yaml", "--split", "test", *sets("real_data=null", *RANDOM)],
            "--split is 'test', but the recipe has no real_data that it could be of; give real_data or no --split",
        ),
        *(
            (
                ["bench", name, "--device", "cudaa"],
                "Invalid value for '--device': 'cudaa' is not one of 'auto', 'cpu', ",
            )
            for name in MEASURED
        ),
        (["report", "toy.yaml"], "teacher.weights is 'out/teacher.safetensors': no such file; `raydfkd run` makes it"),
        (["report", "toy.yaml", *sets(*RANDOM)], "run_dir is 'out': there is neither a report nor an image; "),
        (["gc", "toy.yaml", "--older-than", "soon"], "--older-than is 'soon'; give a number of s, m, h or d, such as "),
        (["teach", "toy.yaml", "--set", NO_TRAINING], "teacher.train is missing, so there is nothing to teach; "),
        (["teach", "toy.yaml", "--set", "teacher.weights=random"], 'teacher.weights is "random", which nothing is '),
    ],
    ids=str,
)
def test_wrong_command_line_gets_one_line_and_nothing_is_written(cluttered, args, message):
    before = cluttered.files()
    answer = cluttered(*args)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(message)
    assert answer.err.count("\n") == 1
    assert cluttered.files() == before


def test_evaluating_a_student_that_is_not_there_says_what_makes_one(finished):
    terminal, _ = finished
    answer = terminal("evaluate", "toy.yaml", "--student", "no.safetensors")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == "--student is 'no.safetensors': no such file; `raydfkd run` or `distill` writes it\n"


def test_evaluating_weights_of_another_network_is_refused(finished):
    terminal, _ = finished
    answer = terminal("evaluate", "toy.yaml", "--student", "out/teacher.safetensors")
    assert answer.code == 2
    assert answer.err.startswith("--student is 'out/teacher.safetensors': weights of another network (head.weight")


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("seed=1", "seed is 0 there and 1 here"),
        ("synthesis.lr=1e-3", "synthesis.lr is 0.005 there and 0.001 here"),
        ("transfer_set.unit.images_per_class=1", "unit.images_per_class is 2 there and 1 here"),
    ],
)
def test_transfer_set_of_another_recipe_is_refused_and_left_alone(finished, change, difference):
    terminal, _ = finished
    before = terminal.files()
    answer = terminal.run(change)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == (
        f"transfer_set.uri is {terminal.folder}/out/transfer_set: holds a set of another recipe ({difference}); "
        "use the recipe and --set of then, or give another uri\n"
    )
    assert terminal.files() == before


# Failure and interruption


@pytest.mark.parametrize("overrides", [[], ["real_data=null", NO_TRAINING, "teacher.weights=random"]], ids=str)
def test_run_of_which_every_unit_fails_ends_with_a_clear_message(raydfkd, overrides):
    answer = raydfkd.run("synthesis.lr=1e30", *overrides)
    assert (answer.code, answer.out) == (1, "")
    for unit in UNITS:
        reason = "ObjectiveNotFiniteError: objective is nan at step 4 (total, cross_entropy, bn_moments)"
        assert f"unit {unit} failed 3 times ({reason}); given up\n" in answer.err
        assert answer.err.count(f"synthesis unit {unit} failed (attempt ") == 3
    assert answer.err.endswith(
        "0 of 2 units are done; the same command tries the others again\n"
        "no image was made, so there is no student and no report\n"
    )
    assert not (raydfkd.folder / "out/student.safetensors").exists()


def test_synthesis_of_which_every_unit_fails_ends_with_a_clear_message(raydfkd):
    answer = raydfkd.run("synthesis.lr=1e30", command="synthesize")
    assert answer.code == 1
    assert (answer.json["images"], answer.json["units"]) == (0, "0/2")
    assert "0 of 2 units are done; the same command tries the others again" in answer.err


def test_unit_that_fails_is_given_up_and_reported_and_the_same_command_tries_it_again(finished, raydfkd):
    with raising_at(UNITS[1], RuntimeError("no luck")):
        answer = raydfkd.run()
    assert answer.code == 1
    assert answer.json["units"] == {"planned": 2, "committed": 1, "attempted": 4, "quarantined": 1}
    assert answer.json["images"] == 20
    assert answer.json["failures"] == [{"unit": UNITS[1], "attempt": 3, "error": "RuntimeError: no luck"}]
    assert f"unit {UNITS[1]} failed 3 times (RuntimeError: no luck); given up\n1 of 2 units are done" in answer.err
    assert "no luck" in (raydfkd.folder / "out/report.html").read_text()

    again = raydfkd.run()
    assert again.code == 0
    assert again.json["units"] == {"planned": 2, "committed": 2, "attempted": 5, "quarantined": 0}
    assert again.json["content_digest"] == finished[1]["content_digest"]


def test_damage_that_the_training_finds_is_reported_and_the_same_command_makes_up_for_it(
    finished, raydfkd, monkeypatch
):
    close = TransferSet.close

    def close_and_rot(transfer_set, plan, given_up):
        close(transfer_set, plan, given_up)
        monkeypatch.undo()
        (part,) = (raydfkd.folder / "out/transfer_set/parts").glob(f"{UNITS[0]}-*")
        part.write_bytes(part.read_bytes()[:-1])

    monkeypatch.setattr(TransferSet, "close", close_and_rot)
    answer = raydfkd.run()
    assert answer.code == 1
    assert answer.json["units"] == {"planned": 2, "committed": 1, "attempted": 2, "quarantined": 0}
    assert answer.err.endswith(
        f"unit {UNITS[0]} was committed, found damaged and taken out\n"
        "1 of 2 units are done; the same command tries the others again\n"
    )

    assert again_and_whole(raydfkd, *finished)


def again_and_whole(raydfkd, terminal, report):
    """Whether the same command once more ends in the set, the student and the report of an undisturbed run."""
    again = raydfkd.run()
    assert again.code == 0
    same = ("content_digest", "images", "student_images", "agreement", "warnings")
    assert {key: again.json[key] for key in same} == {key: report[key] for key in same}
    students = [safetensors.torch.load_file(place.folder / "out/student.safetensors") for place in (raydfkd, terminal)]
    return all(torch.equal(students[0][name], value) for name, value in students[1].items())


def test_student_that_did_not_see_all_images_is_said_to_and_trained_anew_by_the_same_command(finished, raydfkd):
    with raising_at(UNITS[1], RuntimeError("no luck")):
        short = raydfkd.run()
    assert (short.code, short.json["images"], short.json["student_images"]) == (1, 20, 20)
    with pytest.MonkeyPatch.context() as nobody_trains_it:
        nobody_trains_it.setattr("raydfkd.runner.local.outdated", lambda *_: None)
        stale = raydfkd.run()
    assert (stale.json["images"], stale.json["student_images"]) == (40, 20)
    warning = "the student's last steps were drawn from 20 of the 40 images that are there for it now"
    assert warning in stale.json["warnings"][-1]
    page = (raydfkd.folder / "out/report.html").read_text()
    assert "a student taught by 20 synthetic images" in page
    assert warning in html.unescape(page)
    assert again_and_whole(raydfkd, *finished)


def damaged(terminal, name, cut):
    path = terminal.folder / "out" / name
    path.write_bytes(cut(path.read_bytes()))


def test_report_that_was_cut_off_is_one_line_and_the_same_run_makes_it_again(finished):
    terminal, report = finished
    damaged(terminal, "report.json", lambda content: content[: len(content) // 2])
    answer = terminal("report", "toy.yaml")
    assert (answer.code, answer.out) == (2, "")
    assert len(answer.err.splitlines()) == 1
    assert "its report.json is damaged" in answer.err
    assert "`raydfkd run` makes it again" in answer.err
    again = terminal.run()
    assert {**again.json, "command": ""} == {**report, "command": ""}


def test_metrics_with_a_damaged_line_cost_that_line_and_no_report(finished, caplog):
    terminal, report = finished
    damaged(terminal, "metrics.jsonl", lambda content: content.replace(b'"event"', b'"ev\0\n', 1))
    again = terminal.run()
    assert again.code == 0
    assert again.json["content_digest"] == report["content_digest"]
    assert caplog.text.count("damaged and left out") == 1


def test_interrupted_run_says_how_to_go_on_and_goes_on(finished, raydfkd):
    with raising_at(UNITS[1], KeyboardInterrupt()):
        answer = raydfkd.run()
    assert (answer.code, answer.out) == (130, "")
    assert answer.err.splitlines()[-1] == (
        "interrupted; what was committed stays, and the same command goes on from there"
    )
    assert [path.stem for path in (raydfkd.folder / "out/transfer_set/commits").iterdir()] == [UNITS[0]]

    again = raydfkd.run()
    assert again.code == 0
    assert again.json["units"] == {"planned": 2, "committed": 2, "attempted": 2, "quarantined": 0}
    assert again.json["content_digest"] == finished[1]["content_digest"]
    assert "1 of 2 units are there already; resuming from them" in again.err


def test_store_that_fails_for_good_is_one_line(raydfkd, monkeypatch):
    def fail(*_):
        raise StoreError("s3://bucket/set: slow down (503)")

    monkeypatch.setattr("raydfkd.job.transfer_set_of", fail)
    answer = raydfkd("verify", "toy.yaml", *sets("teacher.weights=random", NO_TRAINING))
    assert (answer.code, answer.out) == (1, "")
    assert answer.err == (
        "s3://bucket/set: slow down (503); what was committed stays, and the same command goes on from there\n"
    )


# Imports


REPORT_IMPORTS = """
import sys
from raydfkd.cli import main
sys.argv = ["raydfkd", *sys.argv[1:]]
try:
    main()
finally:
    heavy = ("torch", "torchvision", "torchmetrics", "ray", "pyarrow", "numpy", "sklearn", "rich")
    print(len(sys.modules), *[name for name in heavy if name in sys.modules], file=sys.stderr)
"""


@dataclass(frozen=True)
class Imports:
    """How many modules a command imported, and which of the heavy ones."""

    num_modules: int
    heavy: tuple[str, ...]


def in_another_process(folder, *args, code=0):
    command = [sys.executable, "-c", REPORT_IMPORTS, *args]
    answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert answer.returncode == code, answer.stderr
    num_modules, *heavy = answer.stderr.splitlines()[-1].split()
    return answer.stdout, Imports(int(num_modules), tuple(heavy))


INSTANT = {
    "help": (["--help"], 0),
    "a misspelled command": (["smubit"], 2),
    "a submitted run whose report would be lost": (["submit", "toy.yaml"], 2),
    **{
        f"{command} with a typo": ([command, "toy.yaml", *sets("distill.stps=4")], 2)
        for command in ("check", "run", "synthesize", "distill", "evaluate", "report", "verify", "gc", "submit")
    },
    **{
        f"export {what} with a typo": (["export", what, "toy.yaml", *sets("distill.stps=4")], 2)
        for what in ("student", "set")
    },
    "teach with a typo": (["teach", "toy.yaml", *sets("teacher.train.epoch=4")], 2),
}


@pytest.mark.parametrize(("args", "code"), INSTANT.values(), ids=list(INSTANT))
def test_command_that_needs_only_the_recipe_is_instant_because_it_imports_little(raydfkd, args, code):
    _, imports = in_another_process(raydfkd.folder, *args, code=code)
    assert imports.heavy == ()
    assert imports.num_modules < 600, "torch alone is 700; a quarter of a second is about 300"


def test_help_cuts_no_commands_line_off_at_80_columns(raydfkd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for args in ([], ["bench"], ["export"]):
        text = raydfkd(*args, "--help").out
        assert "..." not in text.partition("Commands:")[2]
        assert max(len(line) for line in text.splitlines()) <= 80
    assert "--version" in raydfkd("--help").out


def test_version_is_printed_without_a_command_and_instantly(raydfkd):
    out, imports = in_another_process(raydfkd.folder, "--version")
    assert out == f"raydfkd {version('raydfkd')}\n"
    assert imports.heavy == ()


def test_package_runs_as_a_module(raydfkd):
    command = [sys.executable, "-m", "raydfkd", "--version"]
    answer = subprocess.run(command, cwd=raydfkd.folder, capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("raydfkd ")


@pytest.mark.parametrize("place", [0, 99], ids=["before the command", "after it"])
def test_debug_shows_where_an_error_of_one_line_comes_from(raydfkd, place):
    args = ["check", "toy.yaml", *sets("teacher.network=torchvision:resnet18", "teacher.options={widht: 3}")]
    plain = raydfkd(*args)
    assert (plain.code, plain.err.count("\n")) == (2, 1)
    args.insert(place, "--debug")
    answer = raydfkd(*args)
    assert answer.code == 2
    assert "Traceback (most recent call last)" in answer.err
    assert "TypeError" in answer.err, "what the line was made of"
    assert answer.err.endswith(plain.err)
    logging.getLogger("raydfkd").setLevel(logging.NOTSET)


def test_help_lists_every_command(raydfkd):
    help_text = raydfkd("--help").out
    for command in (*COMMANDS, "show", "export", "bench", "status", "logs", "stop", "node-watch"):
        assert f"  {command} " in help_text


def test_check_of_everything_imports_torch_and_what_stores_images_only(raydfkd):
    _, imports = in_another_process(raydfkd.folder, "check", "toy.yaml")
    assert imports.heavy == ("torch", "pyarrow", "numpy")


@pytest.mark.cluster
def test_run_in_this_process_does_not_import_ray(raydfkd):
    out, imports = in_another_process(raydfkd.folder, "run", "toy.yaml", "--on", "local", "--json")
    assert "torch" in imports.heavy
    assert "ray" not in imports.heavy
    assert json.loads(out)["images"] == 40
