"""`raydfkd init`: a sound recipe for every teacher of the zoo."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import pytest
import torch
from zoo import CLASSES, ZOO, make

from raydfkd.cli import app
from raydfkd.config.load import load_recipe, packaged_methods
from raydfkd.errors import RecipeError
from raydfkd.networks.build import NETWORKS
from raydfkd.networks.flops import forward_flops
from raydfkd.networks.generators import GENERATORS
from raydfkd.networks.teacher import build_teacher
from raydfkd.runner import pace, small_students
from raydfkd.runner.check import check
from raydfkd.runner.pace import Speed
from raydfkd.runner.run import run
from raydfkd.runner.small_students import MANY_STEPS

QUICK = [row for row in ZOO if not row.is_slow]


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """Makes the files of a row and calls init in their folder; returns the file that it has written."""
    monkeypatch.chdir(tmp_path)

    def begin(row, *more, budget="20h"):
        if row.needs:
            pytest.importorskip(row.needs)
        make(row, tmp_path)
        arguments = ["init", *row.arguments, "--budget", budget, "--name", "mine", *more]
        monkeypatch.setattr(sys, "argv", ["raydfkd", *arguments])
        assert app(arguments, standalone_mode=False) == 0
        return tmp_path / "mine.yaml"

    return begin


def row_called(name):
    return next(row for row in ZOO if row.name == name)


@pytest.fixture
def slow_machine(monkeypatch):
    """A machine on which a unit takes 3 s and a step of the student 0.1 s, however fast this one is."""
    speed = Speed(
        **{"synthesis": 3 / 80, "student": 0.1, "first_batch": 80, "next_batch": 30, "peak_mib": 100},
        device=torch.device("cpu"),
    )
    monkeypatch.setattr(pace, "measure", lambda recipe: speed)


def shape(recipe):
    return "x".join(map(str, recipe.teacher.image_space.shape))


@pytest.mark.usefixtures("slow_machine")
@pytest.mark.parametrize("row", [row for row in QUICK if not row.refused], ids=lambda row: row.name)
def test_recipe_for_a_teacher_is_sound_and_as_the_teacher_is(begun, row):
    page = begun(row)
    recipe = load_recipe(page)
    assert recipe.teacher.classes == (2 if "one logit" in row.name else CLASSES)
    assert not row.space or shape(recipe) == row.space
    assert f"recipe: {row.method} " in page.read_text()


@pytest.fixture
def never_pruned(monkeypatch):
    """As for a teacher whose channels cannot be told apart."""
    monkeypatch.setattr(small_students, "_share_kept", lambda found: None)


@pytest.mark.usefixtures("slow_machine", "never_pruned")
@pytest.mark.parametrize(
    ("options", "size"), [("{}", 28), ("{numbers: 1536}", [24, 64])], ids=["of linear layers", "not square"]
)
def test_student_of_a_teacher_without_convolutions_has_none_either(begun, options, size):
    row = row_called("linear layers alone")
    given = [] if size == 28 else ["--size", "24x64"]
    text = begun(replace(row, arguments=(*row.arguments, "--options", options)), *given).read_text()
    recipe = load_recipe("mine.yaml")
    assert (recipe.student.network, recipe.student.options) == ("mlp", {"widths": [32, 16], "size": size})
    assert "the teacher has no convolutions; linear layers learn more of it" in text
    check(recipe)


@pytest.mark.usefixtures("slow_machine")
@pytest.mark.parametrize("budget", ["20s", "30m"])
def test_student_is_a_part_of_the_teacher_however_short_the_budget(begun, budget):
    text = begun(row_called("linear layers alone"), budget=budget).read_text()
    assert "\n  network: pruned_teacher   # begins with these channels' weights" in text
    check(load_recipe("mine.yaml"))


@pytest.mark.usefixtures("slow_machine", "never_pruned")
@pytest.mark.parametrize(("budget", "kind"), [("20s", "plain_cnn"), ("30m", "vgg_small")])
def test_deep_student_is_taken_where_there_is_time_for_its_steps(begun, budget, kind):
    begun(row_called("state dict"), "--options", "{stride: 1}", budget=budget)
    recipe = load_recipe("mine.yaml")
    assert recipe.student.network == kind
    assert (recipe.distill.steps < MANY_STEPS) == (kind == "plain_cnn")


@pytest.mark.usefixtures("slow_machine", "never_pruned")
@pytest.mark.parametrize("budget", ["20s", "30m"])
def test_student_of_a_strided_teacher_is_strided_however_short_the_budget(begun, budget):
    text = begun(row_called("state dict"), budget=budget).read_text()
    assert "network: convnet   # strided as the teacher is" in text


@pytest.mark.usefixtures("slow_machine")
def test_student_for_very_small_images_pools_once(begun):
    row = row_called("28x28, grey")
    begun(replace(row, arguments=(*row.arguments, "--options", "{size: 12}")), "--size", "12")
    recipe = load_recipe("mine.yaml")
    assert recipe.student.options == {"widths": [4, 8, 16], "size": 12, "pools": 1}
    check(recipe)


@pytest.mark.usefixtures("slow_machine")
@pytest.mark.parametrize(("name", "width"), [("state dict", 8), ("torchvision:resnet18", 32)])
def test_generator_does_little_more_work_than_the_teacher(begun, name, width):
    page = begun(row_called(name))
    recipe = load_recipe(page)
    assert recipe.synthesis.generator["width"] == width
    assert ("one of 32 would do more work than the teacher" in page.read_text()) == (width < 32)
    space, teacher = recipe.teacher.image_space, build_teacher(recipe)
    generator = GENERATORS.build("conv", {"latent": 256, "width": width}, space, where="test")
    within = forward_flops(generator, (256,)) <= 1.5 * forward_flops(teacher, space.shape)
    assert within or width == 8


SLOW = [pytest.param(name, marks=pytest.mark.cluster) for name in ("28x28, grey", "timm:vit_tiny_patch16_224")]


@pytest.mark.parametrize("name", ["state dict", *SLOW])
def test_steps_are_timed_with_the_teacher(begun, name):
    text = begun(row_called(name)).read_text()
    assert re.search(r"a step of synthesis with \d+ images takes [\d.]+ m?s", text)
    load_recipe("mine.yaml")


@pytest.mark.parametrize("row", [row for row in QUICK if row.refused], ids=lambda row: row.name)
def test_teacher_that_cannot_be_taken_is_refused_and_nothing_is_written(begun, row, tmp_path):
    with pytest.raises(RecipeError) as error:
        begun(row)
    assert row.refused in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "mine.yaml").exists()


@pytest.mark.cluster
@pytest.mark.parametrize("row", [row for row in ZOO if not row.refused], ids=lambda row: row.name)
@pytest.mark.usefixtures("slow_machine")
def test_recipe_for_a_teacher_runs_unedited(begun, row):
    result = run(load_recipe(begun(row, budget="20s")))
    assert not result.missing
    assert result.report["images"] == result.job.planned_images
    assert result.report["student"]["estimate"]["words"], "nothing is held out, so an estimate judges"


@pytest.mark.usefixtures("slow_machine")
def test_recipe_says_what_was_seen_and_typed(begun):
    text = begun(row_called("28x28, grey"), budget="20s").read_text()
    assert "# Written by `raydfkd init --network zoo:plain --budget 20s --name mine`" in text
    assert "a step of synthesis with 100 images takes 37.5 ms" in text
    assert "weights: pretrained   # those that it comes with" in text
    assert "size: 28   # the only usual size that it takes" in text
    assert "mean: [0.5]   # a guess; set those that it was trained with" in text


@pytest.mark.usefixtures("slow_machine")
@pytest.mark.cluster
def test_recipe_makes_as_many_drawn_images_as_optimised_ones(begun):
    result = run(load_recipe(begun(row_called("28x28, grey"), budget="20s")))
    assert not result.missing
    assert result.report["images"] == result.job.planned_images == 2 * (100 + 100), "as many are drawn as optimised"


@pytest.mark.usefixtures("slow_machine")
def test_what_is_known_of_the_images_is_taken(begun):
    begun(row_called("4 channels"), "--size", "16x24", "--mean", "0.1,0.2,0.3,0.4", "--std", "0.5,0.5,0.5,0.6")
    space = load_recipe("mine.yaml").teacher.image_space
    assert (space.size, space.mean, space.std) == ((16, 24), (0.1, 0.2, 0.3, 0.4), (0.5, 0.5, 0.5, 0.6))


@pytest.mark.usefixtures("slow_machine")
def test_student_and_folder_that_judges_are_written(begun, tmp_path):
    (tmp_path / "pictures").mkdir()
    text = begun(row_called("state dict"), "--student", "resnet_small").read_text()
    assert "network: resnet_small" in text
    assert "real_data: null" in text


@pytest.mark.usefixtures("slow_machine")
def test_longer_budget_is_more_images_and_steps(begun, tmp_path):
    short = load_recipe(begun(row_called("state dict"), budget="20s"))
    (tmp_path / "mine.yaml").unlink()
    long = load_recipe(begun(row_called("state dict"), budget="250s"))
    assert long.transfer_set.images_per_class > 3 * short.transfer_set.images_per_class
    assert long.distill.steps > 3 * short.distill.steps


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--budget", "10s"],
            "--budget is 10 s, but a unit of each class takes 3 s here, and 2 of them are needed; give at least 17.6 s",
        ),
        (["--budget", "soon"], "--budget is 'soon'; write it as 90s, 30m or 2h"),
        (["--size", "big"], "--size is 'big'; write it as 32, or as 96x64 for height and width"),
        (["--mean", "grey"], "--mean is 'grey'; write a number for each channel, such as 0.5,0.5,0.5"),
        (["--options", "width"], "--options is 'width'; write it as a mapping"),
        (
            ["--options", "{a:1}"],
            "--options is '{a:1}': a: no space after its colon; write one before the value",
        ),
        (["--data", "nowhere"], "--data is 'nowhere': no such folder"),
        (["--size", "2"], "--size is 2, but --network cannot take"),
    ],
)
@pytest.mark.usefixtures("slow_machine")
def test_what_is_wrong_is_said_in_a_line_and_nothing_is_written(begun, tmp_path, more, message):
    with pytest.raises(RecipeError) as error:
        begun(row_called("28x28, grey"), *more)
    assert str(error.value).startswith(message)
    assert not (tmp_path / "mine.yaml").exists()


@pytest.mark.parametrize(
    ("synthesis", "student", "expected"),
    [
        (2.0, 0.9, ("bfloat16", "float32")),
        (1.1, 3.0, ("float32", "bfloat16")),
        (1.1, 0.5, ("float32", "float32")),
    ],
)
def test_recipe_computes_in_bfloat16_where_that_is_clearly_faster(
    begun, slow_machine, monkeypatch, synthesis, student, expected
):
    exact = pace.measure(None)

    def measure(recipe):
        short = {"synthesis": exact.synthesis / synthesis, "student": exact.student / student}
        assert recipe.distill.precision == recipe.synthesis.precision
        return replace(exact, **short) if recipe.synthesis.precision == "bfloat16" else exact

    monkeypatch.setattr(pace, "measure", measure)
    recipe = load_recipe(begun(row_called("28x28, grey"), budget="100s"))
    assert (recipe.synthesis.precision, recipe.distill.precision) == expected


@pytest.mark.usefixtures("slow_machine")
def test_file_that_is_there_is_not_written_over(begun, tmp_path):
    (tmp_path / "mine.yaml").write_text("name: dear")
    with pytest.raises(RecipeError, match="mine.yaml is there already; give another --name, or remove it"):
        begun(row_called("state dict"))
    assert (tmp_path / "mine.yaml").read_text() == "name: dear"


def test_network_without_weights_of_its_own_needs_a_file():
    with pytest.raises(RecipeError, match="--weights is missing, and lenet5 comes with none; give their file"):
        app(["init", "--network", "lenet5"], standalone_mode=False)


def test_weights_of_another_network_are_refused_before_anything_is_measured(begun, tmp_path):
    torch.save({"fc.weight": torch.zeros(4, 3)}, tmp_path / "other.pt")
    with pytest.raises(RecipeError, match=r"weights of another network \(.*; 0 of the network's 14 tensors fit\)"):
        app(["init", "--network", "zoo:Small", "--weights", "other.pt"], standalone_mode=False)


@pytest.mark.usefixtures("slow_machine")
def test_show_says_which_methods_suit(begun, capsys):
    begun(row_called("28x28, grey"))
    capsys.readouterr()
    app(["show", "--for", "mine.yaml"], standalone_mode=False)
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert set(lines) == set(packaged_methods())
    assert lines["deepdream"] == lines["renewed_generator_logits"] == "suits"
    assert "needs BatchNorm layers with stored statistics, but the teacher has none" in lines["deepinversion"]


def test_method_is_no_recipe_by_itself():
    with pytest.raises(RecipeError, match="deepinversion is a method, for any teacher; `raydfkd init` writes a recipe"):
        load_recipe("deepinversion")


@pytest.mark.usefixtures("slow_machine")
def test_unit_holds_all_of_some_dozen_classes_so_that_a_run_by_the_clock_can_end_after_any_batch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = NETWORKS.build("lenet5", {}, 26, 1, where="teacher.options")
    torch.save(teacher.state_dict(), "letters.pt")
    arguments = ["init", "--network", "lenet5", "--weights", "letters.pt", "--size", "32", "--budget", "20h"]
    assert app([*arguments, "--name", "letters"], standalone_mode=False) == 0
    recipe = load_recipe(tmp_path / "letters.yaml")
    assert recipe.transfer_set.unit.classes == recipe.teacher.classes == 26
    assert recipe.synthesis.batch_per_class == 3, "of a hundred images"
