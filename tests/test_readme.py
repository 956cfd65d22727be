"""What the README shows is run as it is printed."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import yaml

import raydfkd
from raydfkd.config import load

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RECIPES = (ROOT / "docs/recipes.md").read_text()
TINY = {
    "teacher.options.widths": [4, 8],
    "teacher.image_space.size": 8,
    "teacher.train.epochs": 1,
    "student.options.widths": [4],
    "synthesis.steps": 4,
    "synthesis.batch_per_class": 2,
    "synthesis.emissions": 1,
    "synthesis.generator": {"kind": "conv", "latent": 4, "width": 4, "doublings": 1},
    "transfer_set.images_per_class": 4,
    "transfer_set.unit.images_per_class": 2,
    "distill.steps": 4,
    "distill.source.wait_for": 1,
    "runtime.device": "cpu",
}
"""What makes the packaged recipe a matter of seconds."""
FEWER = (
    *("synthesis.steps=4", "synthesis.batch_per_class=2", "synthesis.emissions=1", "distill.steps=4"),
    *("transfer_set.unit.images_per_class=4", "transfer_set.images_per_class=8", "distill.source.wait_for=1"),
)


def blocks(language, page=README):
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def test_readme_is_short():
    assert len(README.splitlines()) <= 170


def test_examples_of_the_library_run_as_printed(tmp_path, monkeypatch):
    examples = [block for block in blocks("python") if "raydfkd" in block or "images" in block or "student" in block]
    assert len(examples) == 3
    assert all(len(block.splitlines()) <= 10 for block in examples)
    monkeypatch.chdir(tmp_path)
    load_recipe = load.load_recipe

    def tiny(source, overrides=(), run_dir=None):
        return load_recipe(source, {**TINY, **overrides}, run_dir)

    monkeypatch.setattr(load, "load_recipe", tiny)
    names: dict[str, object] = {}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for block in examples:
            exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "runs/mine/report.html").is_file()
    assert "torch.Size([20, 1, 8, 8])" in said.getvalue()
    assert isinstance(names["images"], raydfkd.TransferSet)


@pytest.fixture
def own_teacher(tmp_path):
    """The folder of somebody who has copied the files of the page on recipes, and has weights."""
    (network,) = [block for block in blocks("python", RECIPES) if "# mynet.py" in block]
    (recipe,) = [block for block in blocks("yaml", RECIPES) if block.startswith("# mine.yaml")]
    (tmp_path / "mynet.py").write_text(network)
    (tmp_path / "mine.yaml").write_text(recipe)
    options = yaml.safe_load(recipe)["teacher"]["options"]
    names: dict[str, object] = {}
    exec(compile(network, "mynet.py", "exec"), names)
    weights = names["build"](**options).state_dict()  # type: ignore[operator]
    safetensors.torch.save_file(weights, tmp_path / "mynet.safetensors")
    return tmp_path


def command(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "raydfkd", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def test_own_teacher_is_checked_and_run_as_printed(own_teacher):
    checked = command(own_teacher, "check", "mine.yaml")
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "# sound: " in checked.stdout
    sets = [argument for change in FEWER for argument in ("--set", change)]
    made = command(own_teacher, "run", "mine.yaml", "--on", "local", *sets)
    assert made.returncode == 0, made.stderr
    assert "held out" in made.stdout
    assert "nobody has measured" in made.stdout
    assert "horse" in (own_teacher / "runs/mine/report.html").read_text()


def test_mistake_is_answered_as_printed(tmp_path):
    (shown,) = [block for block in re.findall(r"```[a-z]*\n(.*?)```", README, flags=re.DOTALL) if "kll" in block]
    line, answer = shown.strip().splitlines()
    found = command(tmp_path, *line.removeprefix("$ raydfkd ").split())
    assert (found.returncode, found.stderr.strip()) == (2, answer)
