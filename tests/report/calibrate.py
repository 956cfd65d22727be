"""Write raydfkd/runner/calibration.json: how agreement on images that are not real foretells that on real ones.

    raydfkd bench zoo --budget 45s --method NAME ... --split validation --json > tests/report/zoo-cells.json
    python tests/report/calibrate.py [--kinds NAME ...]

Log-odds of the agreement on real images are fitted by a sum of log-odds of the evidence, with weights not below zero.
Each teacher's cells are estimated from those of the others; the errors printed, and the interval, are of those.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from scipy.optimize import nnls
from scipy.stats import spearmanr

from raydfkd.runner.estimate import CALIBRATION, log_odds, share

CELLS = Path(__file__).with_name("zoo-cells.json")
KINDS = ("drawn_moved", "generated_moved", "mixed_moved")
LIKE = ("sure_drawn", "sure_generated", "steady_drawn", "steady_generated")
"""Shares that say what a teacher is like on such images."""
RIDGE = 0.1
INSIDE = 0.9
"""Share of the cells within the interval."""


def fit(cells: list[dict], kinds: tuple[str, ...]) -> tuple[np.ndarray, float]:
    """Weights and bias; every teacher's cells count as much as any other's."""
    counts = {teacher: sum(cell["teacher"] == teacher for cell in cells) for teacher in {c["teacher"] for c in cells}}
    worth = np.array([counts[cell["teacher"]] ** -0.5 for cell in cells])
    seen = np.array([[log_odds(cell["evidence"][kind]) for kind in kinds] for cell in cells])
    real = np.array([log_odds(cell["agreement"]) for cell in cells])
    columns = np.column_stack([seen, np.ones(len(cells)), -np.ones(len(cells))]) * worth[:, None]
    held = np.column_stack([RIDGE**0.5 * np.eye(len(kinds)), np.zeros((len(kinds), 2))])
    aims = np.full(len(kinds), RIDGE**0.5 / len(kinds))  # towards the mean of the kinds
    found, _ = nnls(np.vstack([columns, held]), np.concatenate([real * worth, aims]))
    return found[: len(kinds)], float(found[-2] - found[-1])


def odds(cell: dict, kinds: tuple[str, ...], weights: np.ndarray, bias: float) -> float:
    return bias + sum(w * log_odds(cell["evidence"][kind]) for w, kind in zip(weights, kinds, strict=True))


def left_out(cells: list[dict], kinds: tuple[str, ...]) -> list[float]:
    """Log-odds that are estimated for each cell from the cells of other teachers."""
    found = []
    for cell in cells:
        found.append(odds(cell, kinds, *fit([other for other in cells if other["teacher"] != cell["teacher"]], kinds)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kinds", nargs="*", default=KINDS)
    parser.add_argument("--cells", type=Path, default=CELLS)
    parser.add_argument("--dry", action="store_true", help="print the errors, write nothing")
    chosen = parser.parse_args()
    kinds = tuple(chosen.kinds)
    cells = [
        {
            "teacher": row["teacher"],
            "method": row["method"],
            "student": row["student"],
            "agreement": row["result"]["agreement"],
            "evidence": row["result"]["evidence"],
        }
        for row in json.loads(chosen.cells.read_text())
    ]
    estimates = left_out(cells, kinds)
    real = np.array([cell["agreement"] for cell in cells])
    guessed = np.array([share(value) for value in estimates])
    error = float(np.abs(guessed - real).mean())
    for cell, guess in sorted(zip(cells, guessed, strict=True), key=lambda pair: pair[1] - pair[0]["agreement"]):
        name = f"{cell['teacher']:18} {cell['student']:7} {cell['method']:26}"
        sys.stdout.write(f"{name} {100 * cell['agreement']:5.1f} estimated {100 * guess:5.1f}\n")
    over, within = float((guessed - real).max()), float((np.abs(guessed - real) <= 0.1).mean())
    teachers = len({cell["teacher"] for cell in cells})
    sys.stdout.write(
        f"{len(cells)} cells, {teachers} teachers: mean absolute error {100 * error:.1f} points, rank correlation "
        f"{spearmanr(guessed, real).statistic:.2f}, most too high {100 * over:.1f}, within ten {within:.0%}\n"
    )
    weights, bias = fit(cells, kinds)
    off = np.array([log_odds(cell["agreement"]) for cell in cells]) - np.array(estimates)
    below, above = np.quantile(off, [(1 - INSIDE) / 2, (1 + INSIDE) / 2])
    page = {
        "weights": {kind: round(float(weight), 4) for kind, weight in zip(kinds, weights, strict=True)},
        "bias": round(bias, 4),
        "below": round(max(0.0, float(-below)), 4),
        "above": round(max(0.0, float(above)), 4),
        "ranges": {
            name: [min(c["evidence"][name] for c in cells), max(c["evidence"][name] for c in cells)] for name in LIKE
        },
        "cells": len(cells),
        "teachers": teachers,
        "error": round(error, 4),
    }
    sys.stdout.write(json.dumps(page, indent=1) + "\n")
    if not chosen.dry:
        CALIBRATION.write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
