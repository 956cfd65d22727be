"""Writes docs/teachers.md: what `raydfkd init` and `run` make of every teacher of the zoo.

    python tests/report/teachers.py [--budget 20s] [--only NAME ...]

Each row is two commands in an empty folder: `raydfkd init ARGUMENTS --budget B`, with the budget that it asks for where
B is too short, and, unedited, `raydfkd run FILE`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from zoo import ZOO, Row, make

ROOT = Path(__file__).parents[2]
HEAD = """# Teachers

What `raydfkd init` and then, unedited, `raydfkd run` make of a teacher, by the form that it comes in: networks of
`tests/zoo.py` with random weights, four classes, so the figures say that it works and nothing about quality. Written by
`python tests/report/teachers.py`; every row is a test (`tests/commands/test_init.py`).

{engine}

| teacher | `raydfkd init` with | image space found | method chosen | runs: images, student steps, seconds |
|---|---|---|---|---|
"""
FOOT = """
Image space: channels x height x width, and where from. "a guess" means that the network takes images of other sizes as
well; the recipe says so beside the value. A method that needs BatchNorm statistics is chosen where there are some:
`raydfkd show --for RECIPE` says which methods suit a teacher, and why others do not.

Since then `init` chooses `nayer` where a row has `renewed_generator`, and `nayer_procedural` where it has
`renewed_generator_logits`, and other students for small images; those rows are of before.

Not taken: code that nobody allowed (pickled modules never, TorchScript files and exported programs with
`allow_code: true`), teachers of several labels an image, layers without a gradient, such as quantised ones.
"""


def line(row: Row, budget: str) -> str:
    """The row of a teacher."""
    with tempfile.TemporaryDirectory() as folder:
        make(row, Path(folder))
        command = [sys.executable, "-m", "raydfkd"]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}

        def call(*arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
            )

        begun = call("init", *row.arguments, "--budget", budget, "--name", "mine")
        if least := re.search(r"--budget is .* give at least ([\d.]+) (s|min|h)", begun.stderr):
            longer = (
                f"{1.3 * float(least[1]):.0f}{least[2]}"
                if least[2] == "s"
                else f"{1.3 * float(least[1]):.1f}{least[2]}"
            )
            begun = call("init", *row.arguments, "--budget", longer, "--name", "mine")
        typed = " ".join(row.arguments)
        if begun.returncode:
            said = begun.stderr.strip().splitlines()[-1]
            return f"| {row.name} | `{typed}` | refused in a line | | {_cell(said)} |"
        page = (Path(folder) / "mine.yaml").read_text()
        checked = json.loads(call("check", "mine.yaml", "--json").stdout.splitlines()[-1])
        space = checked["teacher"]["image_space"]
        size = space["size"] if isinstance(space["size"], list) else [space["size"]] * 2
        method = re.search(r"^recipe: (\S+)", page, flags=re.MULTILINE)[1]
        known = re.search(r"size(?: is|: [^#]*#) (.*)", page)
        started = time.monotonic()
        ran = call("run", "mine.yaml", "--json")
        seconds = time.monotonic() - started
        if ran.returncode:
            return f"| {row.name} | `{typed}` | | {method} | FAILED: {_cell(ran.stderr.strip().splitlines()[-1])} |"
        report = json.loads(ran.stdout.splitlines()[-1])
        source = known[1].split(";")[0] if known else "given"
        shape = "x".join(map(str, (space["channels"], *size)))
        steps = report["recipe"]["distill"]["steps"]
        made = f"{report['images']:,}, {steps:,}, {seconds:.0f}"
        return f"| {row.name} | `{typed}` | {shape}, {source} | {method} | {made} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", default="20s")
    parser.add_argument("--only", nargs="*", help="names of rows; the others stay as the page has them")
    chosen = parser.parse_args()
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    engine = (
        f"Commit {commit}, torch {torch.__version__.partition('+')[0]}, two CPU cores beside other work; "
        f"`--budget {chosen.budget}`, or what init asks for where that is too short."
    )
    page = ROOT / "docs/teachers.md"
    if chosen.only and (known := re.search(r"^Commit .*$", page.read_text(), flags=re.MULTILINE)):
        engine = f"{known[0]} At commit {commit} again: {', '.join(chosen.only)}."
    before = (
        {known.split(" | ")[0].removeprefix("| "): known for known in page.read_text().splitlines()}
        if page.exists()
        else {}
    )
    lines = []
    for row in ZOO:
        if chosen.only and row.name not in chosen.only and row.name in before:
            lines.append(before[row.name])
            continue
        lines.append(line(row, chosen.budget))
        sys.stderr.write(f"{lines[-1]}\n")
    page.write_text(HEAD.format(engine=engine) + "\n".join(lines) + "\n" + FOOT)


if __name__ == "__main__":
    main()
