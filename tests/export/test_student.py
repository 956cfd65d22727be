"""Exported students answer as they do here, in every form that there is, and where there is no raydfkd."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import students
import torch
import yaml
from PIL import Image
from students import NAMES, of_network, saved_student
from toy import shipped

from raydfkd.config.schema import StudentSpec
from raydfkd.errors import RecipeError
from raydfkd.export import graphs
from raydfkd.export.forms import export_student
from raydfkd.export.plain import _keywords, own_module, write_plain
from raydfkd.export.student import SavedStudent, open_student
from raydfkd.images.pictures import read_picture
from raydfkd.images.pixels import PixelRange
from raydfkd.networks.build import NETWORKS, build_network

JUDGED = {
    "judged_on": "real digits test images",
    "judged_images": 540,
    "teacher": {"top1": 0.987, "parameters": 1},
    "student": {"top1": 0.97, "parameters": 1, "estimate": None},
    "agreement": 0.98,
}
WITHOUT_RAYDFKD = "import sys, runpy; sys.modules['raydfkd'] = None; sys.path.insert(0, sys.argv[1]); import load\n"


def exported(recipe, *formats):
    folder = Path(recipe.run_dir, "export")
    return folder, export_student(recipe, str(folder), formats)


def rebuilt(folder):
    """The network that ``network.py`` makes, with the weights beside it."""
    network = runpy.run_path(f"{folder}/network.py")["build"]()
    network.load_state_dict(safetensors.torch.load_file(f"{folder}/student.safetensors"))
    return network.eval()


def test_load_py_answers_as_the_student_and_names_classes_where_raydfkd_cannot_be_imported(tmp_path):
    recipe = saved_student(tmp_path)
    folder, _ = exported(recipe, "safetensors")
    picture = tmp_path / "picture.png"
    pixels = torch.randint(0, 256, (13, 21, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(picture)
    code = (
        "import torch; x = load.read_picture(sys.argv[2])\n"
        "with torch.no_grad(): print(load.load_student()(x).tolist())\n"
        "sys.argv[:] = ['load.py', sys.argv[2]]; runpy.run_path(load.__file__, run_name='__main__')"
    )
    command = [sys.executable, "-c", WITHOUT_RAYDFKD + code, str(folder), str(picture)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    answer, *likeliest = made.stdout.splitlines()
    space = recipe.teacher.image_space
    image = PixelRange(space).from_uint8(read_picture(picture, space)[None])
    with torch.no_grad():
        logits = open_student(recipe).network(image)
    torch.testing.assert_close(torch.tensor(json.loads(answer)), logits, rtol=1e-5, atol=1e-6)
    shares = logits.softmax(1)[0]
    assert likeliest == [f"{shares[label]:6.1%}  {NAMES[label]}" for label in shares.argsort(descending=True)]


@pytest.mark.parametrize("name", shipped(NETWORKS))
def test_every_network_of_ours_is_built_by_its_own_source_alone(name, tmp_path):
    size = 32 if name in ("lenet5", "mlp", "plain_cnn", "vit_small") else 8
    student = f"student={{network: {name}, options: {{}}}}"
    recipe = saved_student(tmp_path, f"teacher.image_space.size={size}", student)
    folder, found = exported(recipe, "safetensors")
    source = (folder / "network.py").read_text()
    assert "raydfkd" not in source.partition('"""\n')[2]
    assert type(rebuilt(folder)) is not type(open_student(recipe).network)
    assert found["formats"]["safetensors"] == {"max_abs_difference": 0.0}


@pytest.mark.parametrize("network", ["Probabilities", "timm_student", "hf_student", "torchvision:squeezenet1_1"])
def test_network_of_another_library_or_module_is_rebuilt_and_answers_logits(network, tmp_path):
    large = ["teacher.image_space={channels: 3, size: 32, mean: [0.4, 0.4, 0.4], std: [0.3, 0.3, 0.3]}"]
    recipe = saved_student(tmp_path, of_network(network), *(large if "torchvision" in network else []))
    folder, _ = exported(recipe, "safetensors")
    student = open_student(recipe)
    torch.testing.assert_close(rebuilt(folder)(student.normalised).detach(), student.logits)
    configuration = json.loads((folder / "config.json").read_text())
    assert configuration["network"]["module"] == (None if "torchvision" in network else "students")
    assert configuration["class_names"] == list(NAMES)
    card = (folder / "README.md").read_text()
    assert ("the module `students`, which is not in this folder" in card) == ("torchvision" not in network)


def student_by_name(folder, name, options, make):
    """A student whose recipe says ``name`` and whose network is of the function ``make`` of ``students``."""
    recipe = saved_student(folder)
    spec = recipe.student.model_copy(update={"network": name, "options": options})
    network = build_network(StudentSpec(network=f"students:{make}"), recipe.teacher, where="student", seed=1)
    recipe = recipe.model_copy(update={"student": spec})
    return SavedStudent(recipe=recipe, network=network.eval(), digest="", report=None)


@pytest.mark.parametrize(
    ("name", "options", "make"),
    [
        ("timm:test_vit3", {"img_size": 8, "patch_size": 4}, "timm_student"),
        ("hf:somewhere", {}, "hf_student"),
        ("torchhub:FOLDER:plain", {"width": 3}, "plain"),
    ],
)
def test_network_by_the_name_of_a_library_is_rebuilt_by_that_library_alone(name, options, make, tmp_path):
    shutil.copy(students.__file__, tmp_path / "hubconf.py")
    student = student_by_name(tmp_path, name.replace("FOLDER", str(tmp_path)), options, make)
    assert write_plain(student, tmp_path)["max_abs_difference"] == 0
    assert own_module(student) is None
    torch.testing.assert_close(rebuilt(tmp_path)(student.normalised).detach(), student.logits)


def test_network_of_an_archive_has_no_code_to_hand_out_but_graphs(tmp_path):
    student = student_by_name(tmp_path, "torchscript:net.pt", {}, "plain")
    with pytest.raises(RecipeError, match=r"'torchscript:net.pt', an archive whose code .* use torch_export or onnx"):
        write_plain(student, tmp_path)


def test_names_in_options_cannot_become_code_of_the_exported_file():
    (argument,) = _keywords({"x=1); import os; f(y": 2})
    assert argument == "**{'x=1); import os; f(y': 2}"


@pytest.mark.parametrize("network", ["convnet", "Probabilities"])
@pytest.mark.parametrize("form", ["onnx", "torch_export"])
def test_graph_takes_pictures_in_0_to_1_in_batches_of_any_size_and_answers_the_students_logits(form, network, tmp_path):
    pytest.importorskip("onnxscript")
    recipe = saved_student(tmp_path, *([] if network == "convnet" else [of_network(network)]))
    folder, found = exported(recipe, form)
    student = open_student(recipe)
    images = torch.rand(5, 1, 8, 8)
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(f"{folder}/student.onnx")
        answers = [torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0]) for x in (images, images[:1])]
    else:
        module = torch.export.load(f"{folder}/student.pt2").module()
        answers = [module(images), module(images[:1])]
    with torch.no_grad():
        expected = student.network((images - 0.4) / 0.3)
    torch.testing.assert_close(answers[0].detach(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answers[1].detach(), expected[:1], rtol=1e-4, atol=1e-5)
    difference = found["formats"][form]["max_abs_difference"]
    assert 0 <= difference <= 1e-3 * student.logits.abs().max()
    assert f"differ by at most {difference:.2g}" in (folder / "README.md").read_text()


def test_timm_student_is_read_by_timm_with_image_space_and_names_of_classes(tmp_path):
    timm = pytest.importorskip("timm")
    recipe = saved_student(tmp_path, of_network("timm_student"))
    folder, _ = exported(recipe, "timm")
    network = timm.create_model(f"local-dir:{folder}/timm", pretrained=True).eval()
    student = open_student(recipe)
    torch.testing.assert_close(network(student.normalised).detach(), student.logits)
    assert network.pretrained_cfg["input_size"] == (1, 8, 8)
    assert [*network.pretrained_cfg["mean"], *network.pretrained_cfg["std"]] == [0.4, 0.3]
    assert json.loads((folder / "timm/config.json").read_text())["label_names"] == list(NAMES)


def test_transformers_student_is_read_by_transformers_with_image_space_and_names_of_classes(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    recipe = saved_student(tmp_path, of_network("hf_student"))
    capsys.readouterr()
    folder, _ = exported(recipe, "hf")
    assert capsys.readouterr() == ("", "")
    network = transformers.AutoModelForImageClassification.from_pretrained(f"{folder}/hf")
    student = open_student(recipe)
    torch.testing.assert_close(network(student.normalised).logits.detach(), student.logits)
    assert network.config.id2label == dict(enumerate(NAMES))
    processor = json.loads((folder / "hf/preprocessor_config.json").read_text())
    assert (processor["image_mean"], processor["size"]) == ([0.4], {"height": 8, "width": 8})


def test_card_says_what_the_student_was_measured_on_and_leaves_the_license_open(tmp_path):
    folder, _ = exported(saved_student(tmp_path, report=JUDGED), "safetensors")
    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["pipeline_tag"] == "image-classification"
    assert "license" not in head
    assert "# license: fill in" in card
    assert "| | teacher | student |\n|---|---|---|\n| top-1 on 540 real digits test images | 98.70% | 97.00% |" in card
    assert "| agreement with the teacher on 540 real digits test images | | 98.00% |" in card
    assert str(tmp_path) not in card, "a folder of this machine is nobody's business"


def test_card_of_a_student_that_no_real_image_judged_says_so(tmp_path):
    report = {**JUDGED, "judged_on": "synthetic images that were held out"}
    estimate = {"agreement": 0.5, "low": 0.3, "high": 0.7, "words": "from a lot", "evidence": {}}
    report |= {"teacher": {"top1": None}, "student": {"top1": None, "estimate": estimate}}
    folder, _ = exported(saved_student(tmp_path, report=report), "safetensors")
    card = (folder / "README.md").read_text()
    assert "top-1" not in card
    estimated = "| agreement with the teacher on real images, estimated | | 50 % (30 to 70) |"
    held_out = "| agreement with the teacher on 540 synthetic images that were held out | | 98.00% |"
    assert card.index(estimated) < card.index(held_out)
    assert "nobody has measured.\nThe estimate: from a lot." in card


def test_card_has_no_figures_of_another_training(tmp_path):
    recipe = saved_student(tmp_path, report=JUDGED)
    saved_student(tmp_path, "distill.steps=7")
    folder, _ = exported(recipe, "safetensors")
    card = (folder / "README.md").read_text()
    assert "98.70%" not in card
    assert "It was not judged" in card


def test_form_that_answers_otherwise_is_refused_and_nothing_is_written(tmp_path):
    recipe = saved_student(tmp_path, of_network("Forgetful"))
    with pytest.raises(RecipeError, match=r"^--format safetensors: its logits differ from the student's by .*; use an"):
        exported(recipe, "safetensors")
    assert not (tmp_path / "run/export").exists() or not list((tmp_path / "run/export").iterdir())


def test_network_that_is_no_graph_is_refused_in_one_line_with_the_remedy(tmp_path):
    recipe = saved_student(tmp_path, of_network("Reads"))
    with pytest.raises(RecipeError, match=r"^--format torch_export: students:Reads cannot be exported \(.*use safet"):
        exported(recipe, "torch_export")


@pytest.mark.parametrize(("form", "library"), [("timm", "timm"), ("hf", "transformers")])
def test_format_of_a_library_is_refused_for_a_student_of_another(form, library, tmp_path):
    with pytest.raises(
        RecipeError, match=f"--format is {form}, but student.network convnet is ConvNet, no model of {library}"
    ):
        exported(saved_student(tmp_path), form)


def test_missing_package_is_named_with_the_extra_that_has_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(RecipeError, match=r"--format onnx needs onnxscript, .*; pip install 'raydfkd\[onnx\]'"):
        graphs.write_onnx(open_student(saved_student(tmp_path)), tmp_path)


def test_run_without_a_student_is_one_line_with_the_remedy(tmp_path):
    recipe = saved_student(tmp_path)
    (tmp_path / "run/student.safetensors").unlink()
    with pytest.raises(
        RecipeError, match="run_dir is .*: there is no student yet; `raydfkd run` or `distill` makes it"
    ):
        exported(recipe, "safetensors")
