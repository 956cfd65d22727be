"""Methods side by side on one teacher."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from test_bench_quality import OVERRIDES, RESULT, Here
from toy import toy_recipe

from raydfkd.bench import methods, quality
from raydfkd.bench.controls import NOISE, REAL, RealImages
from raydfkd.bench.methods import Comparison, Found, bench_methods, methods_named
from raydfkd.config.load import load_recipe, load_with_method, packaged_methods
from raydfkd.errors import RecipeError
from raydfkd.images.real_data import in_memory
from raydfkd.networks.teacher import open_teacher
from raydfkd.runner.teach import judging_data
from raydfkd.synthesis.setting import build_setting

COMPARISON = Comparison(
    recipe="digits-generators",
    methods=("renewed_generator",),
    budget_s=4.0,
    seeds=(0,),
    split="validation",
    overrides=(*OVERRIDES[:3], "transfer_set.unit.images_per_class=4", "transfer_set.images_per_class=8"),
)


def test_every_method_is_measured_at_each_share_between_both_controls():
    cells = replace(COMPARISON, seeds=(0, 1)).cells()
    assert len(cells) == 3 * 2 * 3
    assert [cell.budget_s for cell in cells] == 6 * [4.0] + 6 * [2.0] + 6 * [1.0]
    assert [cell.method for cell in cells[:3]] == [REAL, NOISE, "renewed_generator"]


@pytest.mark.cluster
def test_comparison_is_measured_once_and_then_known(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "ProcessPoolExecutor", Here)
    comparison = replace(COMPARISON, shares=(1.0,), methods=("dafl",), budget_s=0.5, overrides=OVERRIDES[:3])
    told = []
    found = bench_methods(comparison, tmp_path, told=told.append)
    assert sorted(result.method for result in told) == sorted([REAL, NOISE, "dafl"])
    assert all(0 <= result.student_top1 <= 1 and result.images > 0 for result in told)
    assert all("bench methods" in result.command and "--full" in result.command for result in told)
    monkeypatch.setattr(quality, "ProcessPoolExecutor", None)
    monkeypatch.setattr(quality, "_teach", None)
    again = bench_methods(comparison, tmp_path)
    assert {result.command: result for result in again.results} == {result.command: result for result in told}
    assert len(json.loads(found.to_json())["results"]) == 3


def test_method_that_does_not_suit_the_teacher_has_a_reason_instead_of_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "bench_quality", lambda cells, folder, **_: [])
    plain = replace(
        COMPARISON,
        methods=("deepinversion", "renewed_generator_logits"),
        overrides=("teacher.network=lenet5", "teacher.options={}", "student.network=lenet5", "student.options={}"),
    )
    found = bench_methods(plain, tmp_path)
    assert list(found.left_out) == ["deepinversion"]
    assert "needs BatchNorm layers" in found.left_out["deepinversion"]
    assert "`deepinversion` has no row: " in found.markdown()


def test_cell_that_comes_to_nothing_leaves_the_others_their_rows(tmp_path, monkeypatch):
    def measure(plan):
        if plan.cell.method == "renewed_generator":
            raise ArithmeticError("nothing but NaN")
        return replace(RESULT, method=plan.cell.method)

    monkeypatch.setattr(quality, "ProcessPoolExecutor", Failing)
    monkeypatch.setattr(quality, "measure", measure)
    monkeypatch.setattr(quality, "_teach", lambda *_: None)
    found = bench_methods(replace(COMPARISON, shares=(1.0,)), tmp_path)
    assert {result.method for result in found.results} == {REAL, NOISE}
    assert "nothing but NaN" in found.left_out["renewed_generator"]


class Failing(Here):
    """A pool whose work may fail."""

    def submit(self, work, *args):
        from concurrent.futures import Future

        done = Future()
        try:
            done.set_result(work(*args))
        except ArithmeticError as error:
            done.set_exception(error)
        return done


def test_table_has_the_best_method_first_and_says_what_each_budget_bought():
    results = [
        replace(RESULT, method=method, budget_s=budget, seed=seed, student_top1=top1)
        for method, budget, seed, top1 in (
            (REAL, 4.0, 0, 0.9),
            (NOISE, 4.0, 0, 0.1),
            ("some/mine.yaml", 2.0, 0, 0.3),
            ("some/mine.yaml", 4.0, 0, 0.5),
            ("some/mine.yaml", 4.0, 1, 0.7),
        )
    ]
    table = Found(comparison=COMPARISON, results=tuple(results), left_out={}).markdown().split("\n")
    assert table[2] == "| method | 2 s | 4 s | images | steps | synthesis s |"
    assert [row.split(" | ")[0] for row in table[4:]] == [
        "| real images (control)",
        "| `mine`",
        "| noise (control)",
    ]
    assert "| 30.0 | 60.0 (50.0-70.0) | 600 |" in table[5]
    assert "| - | 10.0 |" in table[6]


def test_method_takes_the_place_of_the_recipes_own_on_equal_terms():
    base, found = load_recipe("fashion-resnet"), load_with_method("fashion-resnet", "gaussian_noise")
    assert found.synthesis.synthesizer == "noise_images"
    assert found.synthesis.precision == base.synthesis.precision == "bfloat16"
    for name in ("optimizer", "augment", "batch_size", "precision", "steps"):
        assert getattr(found.distill, name) == getattr(base.distill, name), name
    assert (found.teacher.network, found.student, found.real_data) == (
        base.teacher.network,
        base.student,
        base.real_data,
    )
    assert found.name == "fashion-resnet-gaussian_noise"


def test_full_recipe_lends_its_method_to_another_teacher():
    lent, taken = load_recipe("fashion-resnet"), load_with_method("digits-generators", "fashion-resnet")
    assert taken.synthesis.objective == lent.synthesis.objective
    assert taken.synthesis.options["renewal"] == lent.synthesis.options["renewal"]
    assert taken.teacher.network == load_recipe("digits-generators").teacher.network


@pytest.mark.parametrize("method", packaged_methods())
def test_every_packaged_method_goes_with_a_recipe(method):
    assert load_with_method("fashion-resnet", method).name == f"fashion-resnet-{method}"


def test_real_images_come_from_the_training_split_with_the_teachers_answers():
    recipe = load_recipe("digits-generators", ["teacher.weights=random", "teacher.train=null", "seed=3"])
    teacher = open_teacher(recipe)
    setting = build_setting(load_with_noise(recipe), teacher.module, torch.device("cpu"))
    images = in_memory(judging_data(recipe).load("train")).images
    control = RealImages(setting, recipe=recipe)
    request = recipe.plan()[0].request
    made = torch.cat([batch.images for batch in control.produce(request, lambda _: None)])
    known = {image.numpy().tobytes() for image in images}
    assert len(made) == request.count
    assert all(image.numpy().tobytes() in known for image in made)
    others = torch.cat([batch.images for batch in control.produce(request, lambda _: None)])
    assert not torch.equal(made, others), "no image again until all were seen"


def load_with_noise(recipe):
    noise = load_with_method("digits-generators", "gaussian_noise", ["teacher.weights=random", "teacher.train=null"])
    return recipe.model_copy(update={"synthesis": noise.synthesis})


def test_control_is_not_named_for_it_is_always_there():
    with pytest.raises(RecipeError, match="real_images is a control"):
        methods_named([REAL])
    assert methods_named([]) == tuple(packaged_methods())


def test_recipe_without_real_data_is_refused_before_any_work(tmp_path):
    recipe = toy_recipe(tmp_path)
    assert recipe.real_data is None
    comparison = replace(COMPARISON, recipe=str(tmp_path / "toy.yaml"), methods=(), overrides=())
    with pytest.raises(RecipeError, match="real_data is missing"):
        bench_methods(replace(comparison, overrides=(f"teacher.weights={tmp_path}/teacher.safetensors",)), tmp_path)
