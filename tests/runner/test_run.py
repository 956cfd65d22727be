"""The spine as a library: one call from the recipe to the report, and its parts."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import safetensors.torch
import torch
from toy import batchnorm_teacher, fresh_student_of, toy_recipe

import raydfkd
import raydfkd.networks.teacher
from raydfkd.config.load import load_recipe
from raydfkd.errors import RecipeError
from raydfkd.job import open_job
from raydfkd.networks.weights import save_bytes
from raydfkd.report.page import read_report
from raydfkd.runner.check import check
from raydfkd.runner.judge import NOTHING
from raydfkd.runner.run import report_again, run
from raydfkd.runner.view import SetView
from raydfkd.store.folders import LocalFolder
from raydfkd.store.store import Store

SMOKE = Path(__file__).parents[2] / "jobs" / "smoke.yaml"


def smoke(folder, *overrides):
    return load_recipe(SMOKE, ["runtime.executor=local", "runtime.device=cpu", *overrides], str(folder))


@pytest.fixture
def calls(monkeypatch):
    """Counts looks into stores, teachers that are built and weights that are read."""
    counts = Counter()

    def counting(place, name):
        original = getattr(place, name)

        def counted(*args, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(place, name, counted)

    counting(Store, "list")
    counting(raydfkd.networks.teacher, "build_network")
    counting(raydfkd.networks.teacher, "load_weights")
    return counts


@pytest.mark.parametrize("is_taught", [False, True])
def test_a_run_looks_into_its_store_and_opens_its_teacher_only_a_few_times(tmp_path, calls, is_taught):
    recipe = smoke(tmp_path)
    if is_taught:
        run(recipe)
        calls.clear()
    run(recipe)
    assert calls["list"] <= 12
    assert 1 <= calls["build_network"] <= 2
    assert calls["load_weights"] <= 2


def test_a_run_is_one_call_that_says_nothing_and_returns_what_it_came_to(tmp_path, capfd):
    result = raydfkd.run(smoke(tmp_path))
    assert capfd.readouterr().out == ""
    assert (result.outcome.attempted, result.outcome.given_up, result.missing) == (4, (), frozenset())
    assert result.student == tmp_path / "student.safetensors"
    assert result.page == tmp_path / "report.html"
    assert result.student.is_file()
    assert result.page.is_file()
    assert read_report(tmp_path) == json.loads(json.dumps(result.report))
    assert load_recipe(tmp_path / "recipe.yaml") == result.job.recipe


def test_a_finished_run_called_again_keeps_its_report_but_for_the_command(tmp_path):
    first, again = (run(smoke(tmp_path)).report for _ in range(2))
    assert {**again, "command": ""} == {**first, "command": ""}


def test_images_can_be_made_looked_at_distilled_and_judged_by_one_call_each(tmp_path):
    recipe = smoke(tmp_path / "apart")
    images = raydfkd.synthesize(recipe)
    assert sum(len(rows) for rows in images) == 80
    student = raydfkd.distill(recipe, images)
    assert not student.training
    judged = raydfkd.evaluate(recipe)
    whole = raydfkd.run(smoke(tmp_path / "whole"))
    assert judged == {key: whole.report[key] for key in judged}
    expected = safetensors.torch.load_file(whole.student)
    assert all(torch.equal(expected[name], value) for name, value in student.state_dict().items())


@pytest.fixture
def finished(tmp_path):
    """The folder of a finished run, whose files nobody may write from then on."""
    run(smoke(tmp_path / "theirs"))
    with pytest.MonkeyPatch.context() as patch:
        for act in ("put", "put_new", "delete"):
            patch.setattr(LocalFolder, act, refusing_below(tmp_path / "theirs", getattr(LocalFolder, act)))
        yield tmp_path / "theirs"


def refusing_below(place, act):
    def refuse(folder, path, *content):
        if (folder._root / path).is_relative_to(place):
            raise PermissionError(13, "Permission denied")
        return act(folder, path, *content)

    return refuse


def theirs(finished, folder):
    return smoke(folder, f"transfer_set.uri={finished}/transfer_set", f"teacher.weights={finished}/teacher.safetensors")


def test_set_that_may_only_be_read_is_distilled_judged_and_reported(finished, tmp_path):
    mine = theirs(finished, tmp_path / "mine")
    with pytest.raises(RecipeError, match="transfer_set.uri is .* cannot be written"):
        run(mine)
    raydfkd.distill(mine)
    assert report_again(mine)[0]["images"] == 80
    before = sorted((tmp_path / "mine").rglob("*"))
    judged = raydfkd.evaluate(mine)
    assert sorted((tmp_path / "mine").rglob("*")) == before
    assert raydfkd.evaluate(smoke(finished)) == judged, "in the other's folder, which may not be written either"


def test_damage_in_a_set_that_may_only_be_read_is_left_out(finished, tmp_path):
    part = next((finished / "transfer_set/parts").iterdir())
    part.write_bytes(bytes(part.stat().st_size))
    mine = theirs(finished, tmp_path / "mine")
    view = SetView(open_job(mine))
    assert sum(len(rows) for rows in view.rows()) == 60
    assert len(view.missing) == 1


def test_run_dir_without_hard_links_will_do_where_the_set_is_elsewhere(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    random = ("teacher.weights=random", "teacher.train=null", "transfer_set.uri=memory://no-links")
    check(smoke(tmp_path, *random))
    with pytest.raises(RecipeError, match="cannot create an object only once"):
        check(smoke(tmp_path, *random[:2]))


def test_images_of_another_recipe_are_not_distilled(tmp_path):
    images = raydfkd.synthesize(toy_recipe(tmp_path / "one", ["seed=1"]))
    with pytest.raises(RecipeError, match="images are of another recipe or teacher"):
        raydfkd.distill(toy_recipe(tmp_path / "other"), images)


def test_set_without_an_image_is_not_distilled(tmp_path):
    recipe = toy_recipe(tmp_path)
    raydfkd.synthesize(recipe)
    for path in (tmp_path / "run" / "transfer_set" / "commits").iterdir():
        path.unlink()
    with pytest.raises(RecipeError, match="no image came of its synthesis"):
        raydfkd.distill(recipe)


def test_images_that_are_made_against_the_student_are_made_by_run_alone_and_nothing_is_written(tmp_path):
    against = ["synthesis.objective=[cross_entropy, {term: competition, weight: 5}]", "rounds=2"]
    with pytest.raises(RecipeError, match="made against the student, who is trained beside them; use run"):
        raydfkd.synthesize(toy_recipe(tmp_path, against))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "judged_on", "judged_images"),
    [
        (["distill.holdout=0.5"], "synthetic images that were held out", 12),
        (["distill.holdout=0"], NOTHING, 0),
        (["real_data=null", "transfer_set.images_per_class=3"], NOTHING, 0),
    ],
)
def test_without_real_data_the_report_says_on_which_images_the_student_was_judged(
    tmp_path, overrides, judged_on, judged_images
):
    report = run(toy_recipe(tmp_path, overrides)).report
    assert (report["judged_on"], report["judged_images"]) == (judged_on, judged_images)
    assert report["teacher"]["top1"] is report["student"]["top1"] is None
    assert report["agreement"] is None if judged_on == NOTHING else 0 <= report["agreement"] <= 1
    again = raydfkd.evaluate(toy_recipe(tmp_path, overrides))
    assert again == {key: report[key] for key in again}


def test_agreement_is_measured_on_the_held_out_images_and_no_others(tmp_path):
    recipe = toy_recipe(tmp_path, ["distill.holdout=0.5"])
    result = run(recipe)
    student, teacher = student_of(result), batchnorm_teacher()
    held_out = [commit for commit in result.job.snapshot().commits if commit.unit.startswith("r001")]
    images = torch.cat([result.job.transfer_set.read(part).images for commit in held_out for part in commit.parts])
    seen = (images.float() / 255 - 0.4) / 0.3
    with torch.no_grad():
        agreement = (student(seen).argmax(1) == teacher(seen).argmax(1)).float().mean().item()
    assert result.report["agreement"] == pytest.approx(agreement)


def student_of(result):
    student = fresh_student_of(result.job).eval()
    student.load_state_dict(safetensors.torch.load_file(result.student))
    return student


def test_images_that_the_teacher_does_not_recognise_are_warned_of(tmp_path):
    blind = batchnorm_teacher()
    with torch.no_grad():
        blind.head.weight.mul_(1e-3)
        blind.head.bias.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))
    recipe = toy_recipe(tmp_path)
    Path(recipe.teacher.weights).write_bytes(save_bytes(blind))
    report = run(recipe).report
    assert (report["intended_class"], report["answered_classes"]) == (0.25, 1)
    assert [warning.partition(" in ")[0] for warning in report["warnings"]] == [
        "the teacher finds the intended class",
        "the teacher finds only 1 of 4 classes",
    ]


def test_images_without_targets_have_no_intended_class(tmp_path):
    settings = ["synthesis.targets=none", "synthesis.objective=[one_hot, class_balance]"]
    report = run(toy_recipe(tmp_path, settings, synthesizer="generator")).report
    assert report["intended_class"] is None
    assert 1 <= report["answered_classes"] <= 4


def test_progress_and_curves_of_units_are_in_the_metrics(tmp_path):
    result = run(toy_recipe(tmp_path))
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[:2] == ["session", "synthesis"]
    assert Counter(kinds)["unit"] == 4
    progress = [event for event in events if event["event"] == "progress"]
    assert {event["unit"] for event in progress} == result.job.unit_ids
    assert {event["steps"] for event in progress} == {8}
    assert {event["training"] for event in events if event["event"] == "student"} == {result.job.student_digest[:8]}
