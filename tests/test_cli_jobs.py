"""Every file of jobs/ by the commands that people use on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from raydfkd.config.load import load_recipe
from raydfkd.runner.run import run

JOBS = Path(__file__).parents[1] / "jobs"
NAMES = sorted(path.name for path in JOBS.glob("*.yaml"))
IMAGENET = [name for name in NAMES if name.startswith("imagenet-")]
QUICK = ("quickstart.yaml",)
"""What the ordinary tests run of them; `make test-cluster` runs the others too."""


def quick_first(names):
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.cluster) for name in names]


NO_FILES = ["teacher.weights=random", "transfer_set.uri=memory://jobs"]


def raydfkd(*args: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from raydfkd.cli import main; main()", *args]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=300)


def sets(*overrides: str) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


@pytest.mark.parametrize("name", quick_first(NAMES))
def test_job_shows_no_mistake_by_itself(name, tmp_path):
    answer = raydfkd("check", str(JOBS / name), "--no-code", folder=tmp_path)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_header_of_a_job_says_its_command(name):
    header = (JOBS / name).read_text().partition("\nname:")[0]
    assert f"#   raydfkd run jobs/{name}" in header or f"#   raydfkd submit jobs/{name}" in header


# the other large ones have the networks of the first, which are seconds of work
@pytest.mark.cluster
@pytest.mark.parametrize("name", ["one-gpu.yaml", "chaos.yaml"])
def test_every_part_of_a_job_can_be_built_without_its_files_and_without_a_gpu(name, tmp_path):
    folder = ["--run-dir", str(tmp_path / "run")]
    answer = raydfkd("check", str(JOBS / name), *folder, *sets(*NO_FILES), folder=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert (answer.returncode, answer.stderr) == (0, "")


@pytest.mark.cluster
def test_job_for_gpus_is_refused_where_this_process_would_have_to_be_the_worker(tmp_path):
    answer = raydfkd(
        "check", str(JOBS / "one-gpu.yaml"), "--on", "local", *sets(*NO_FILES), folder=tmp_path, CUDA_VISIBLE_DEVICES=""
    )
    assert answer.returncode == 2
    assert answer.stderr.startswith("runtime.device is 'cuda', but this machine has no CUDA device")


@pytest.mark.cluster
def test_missing_weights_of_a_large_job_are_one_line(tmp_path):
    answer = raydfkd("check", str(JOBS / "one-gpu.yaml"), folder=tmp_path)
    assert answer.returncode == 2
    assert answer.stderr == (
        "teacher.weights is 'resnet50.pth': no such file; give trained weights, or teacher.train to train them\n"
    )


@pytest.mark.cluster
def test_smoke_runs_here(tmp_path):
    answer = raydfkd("run", str(JOBS / "smoke.yaml"), "--on", "local", folder=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "runs/smoke/report.html").is_file()


def test_chaos_has_many_small_units_and_asks_for_no_student():
    recipe = load_recipe(JOBS / "chaos.yaml")
    assert len(recipe.plan()) == 200
    assert recipe.rounds == 1
    assert {term.term for term in recipe.synthesis.objective} <= {"cross_entropy", "bn_moments"}


def test_large_jobs_differ_from_the_smallest_in_scale_only():
    for name in ("eight-gpus.yaml", "spot-64.yaml"):
        changed = yaml.safe_load((JOBS / name).read_text())
        assert changed["recipe"] == "one-gpu.yaml"
        assert changed.keys() <= {"recipe", "name", "run_dir", "teacher", "transfer_set", "distill", "runtime"}
        assert changed["distill"].keys() <= {"steps", "batch_size", "optimizer", "checkpoint_every"}


@pytest.mark.parametrize("name", [one for one in IMAGENET if one != "imagenet-dream.yaml"])
def test_job_for_imagenet_makes_images_of_all_classes(name):
    recipe = load_recipe(JOBS / name)
    assert (len(recipe.classes), recipe.teacher.image_space.size) == (1000, 224)
    assert {len(unit.request.classes) for unit in recipe.plan()} == {recipe.transfer_set.unit.classes}


@pytest.mark.parametrize("name", quick_first(IMAGENET))
def test_small_form_of_a_job_for_imagenet_goes_the_whole_way(name, tmp_path):
    recipe = load_recipe(JOBS / name, ["scale=smoke"], run_dir=tmp_path)
    assert recipe.synthesis.synthesizer == load_recipe(JOBS / name).synthesis.synthesizer
    report = run(recipe).report
    assert (report["images"], report["units"]["committed"]) == (16, len(recipe.plan()))
    assert report["verifier"]["images"] == 16
    assert report["moment_distance"]["synthetic"] < report["moment_distance"]["noise"]
    assert "goldfish" in (tmp_path / "report.html").read_text()
