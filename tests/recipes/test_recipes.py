from __future__ import annotations

from pathlib import Path

import pytest
from toy import quiet_events, run_here

from raydfkd.config.load import load_recipe, packaged_recipes
from raydfkd.job import open_job
from raydfkd.report.metrics import read_metrics
from raydfkd.runner.check import check

NO_DATA = ["real_data=null", "teacher.train=null", "teacher.weights=random"]
HERE = ["runtime.executor=local", "runtime.device=cpu"]
SHORT = {
    "generator": ["synthesis.steps=2", "synthesis.batch_per_class=2", "synthesis.emissions=1"],
    "pixels": ["synthesis.stages=[{steps: 2}, {steps: 2}]", "synthesis.batch_size=20"],
}
"""What makes each synthesizer quick."""


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipe_is_named_after_its_file_and_can_be_planned(name, tmp_path):
    recipe = load_recipe(name, run_dir=str(tmp_path))
    assert recipe.name == name
    units = recipe.plan()
    images = sum(unit.request.count for unit in units)
    assert images == recipe.transfer_set.images_per_class * len(recipe.classes)
    assert recipe.distill.source.wait_for <= images


@pytest.mark.parametrize("name", packaged_recipes())
def test_every_part_of_a_packaged_recipe_can_be_built(name, tmp_path):
    check(load_recipe(name, NO_DATA, run_dir=str(tmp_path)))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.cluster) if name.startswith("fashion-resnet") else name
        for name in packaged_recipes()
    ],
)
def test_packaged_recipe_makes_images_and_five_steps(name, tmp_path):
    packaged = load_recipe(name)
    images_per_class = 2 * packaged.rounds
    short = [
        *SHORT[packaged.synthesis.synthesizer],
        f"transfer_set.images_per_class={images_per_class}",
        "transfer_set.unit.images_per_class=2",
        "distill.steps=5",
        "distill.batch_size=8",
        "distill.log_every=1",
    ]
    job = open_job(load_recipe(name, [*NO_DATA, *HERE, *short], run_dir=str(tmp_path)))
    outcome, _ = run_here(job, quiet_events(tmp_path))
    assert outcome.given_up == ()
    assert job.snapshot().images == job.planned_images == images_per_class * len(job.recipe.classes)
    steps = [entry for entry in read_metrics(tmp_path / "metrics.jsonl") if entry["event"] == "student"]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5]
    assert all(entry["loss"] is not None for entry in steps)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "jobs").glob("*.yaml")), ids=lambda path: path.name
)
def test_job_is_a_recipe_whose_header_says_its_command(path):
    assert load_recipe(path).plan()
    assert f"raydfkd run jobs/{path.name}" in path.read_text()
