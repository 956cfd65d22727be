"""Fit the estimate of the agreement on real images to students of the zoo, and say how good it is elsewhere.

    raydfkd bench zoo ... --json > FILE        (any budget, students and methods; rows of several files count together)
    python tests/report/calibrate.py FILE...

Writes raydfkd/runner/calibration.json, and prints the lines of benchmarks.md. Students of real images do not count: no
run makes such ones.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from raydfkd.bench.calibration import Known, cross_validated, fit
from raydfkd.bench.controls import REAL
from raydfkd.config.load import load_recipe
from raydfkd.runner.estimate import CALIBRATION

ROOT = Path(__file__).parents[2]


def known_of(row: dict) -> Known:
    recipe = load_recipe(row["teacher"])
    space, result = recipe.teacher.image_space, row["result"]
    return Known(
        teacher=row["teacher"],
        agreement=result["agreement"],
        evidence=result["evidence"],
        classes=recipe.teacher.classes,
        edge=min(space.height, space.width),
    )


def heats(rows: list[dict], estimates: list[float | None]) -> list[tuple[str, float, float, float]]:
    """Of several methods with the same teacher, student, budget and seed: best, chosen by estimate, and their mean."""
    groups = defaultdict(list)
    for row, estimate in zip(rows, estimates, strict=True):
        result = row["result"]
        if estimate is not None and row["method"] != "gaussian_noise":
            key = (row["teacher"], row["student"], result["budget_s"], result["seed"], result["device"])
            groups[key].append((estimate, result["agreement"]))
    return [
        (key[0], max(real for _, real in group), max(group)[1], sum(real for _, real in group) / len(group))
        for key, group in groups.items()
        if len(group) >= 3
    ]


def main(files: list[str]) -> None:
    rows = [row for file in files for row in json.loads(Path(file).read_text())]
    rows = [row for row in rows if row["method"] != REAL]
    known = [known_of(row) for row in rows]
    accuracy, estimates = cross_validated(known)
    teachers = {one.teacher for one in known}
    measured = {
        **{key: round(value, 4) for key, value in asdict(accuracy).items()},
        "students": len(known),
        "teachers": len(teachers),
        "command": f"python tests/report/calibrate.py {' '.join(files)}",
    }
    calibration = fit(known, measured=measured)
    CALIBRATION.write_text(json.dumps(asdict(calibration), indent=1) + "\n", encoding="utf-8")
    lines = [json.dumps(measured, indent=1), "", "| teacher | students | off by, mean | most too high | most too low |"]
    lines.append("|---|---|---|---|---|")
    for name in sorted(teachers):
        own = [(one, estimate) for one, estimate in zip(known, estimates, strict=True) if one.teacher == name]
        misses = [100 * (estimate - one.agreement) for one, estimate in own if estimate is not None]
        figures = "unknown | - | -"
        if misses:
            error = sum(map(abs, misses)) / len(misses)
            figures = f"{error:.1f} | {max(0, *misses, 0):.0f} | {max(0, *(-miss for miss in misses), 0):.0f}"
        lines.append(f"| {name} | {len(own)} | {figures} |")
    lines += ["", "| several methods: teacher | best | chosen by the estimate | mean |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {100 * best:.1f} | {100 * chosen:.1f} | {100 * mean:.1f} |"
        for name, best, chosen, mean in heats(rows, estimates)
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
