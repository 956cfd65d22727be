"""Methods side by side on one teacher, for equal device-seconds, between the two controls that say what they mean."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from raydfkd.bench.controls import NOISE, REAL
from raydfkd.bench.quality import Cell, Result, bench_quality, spread
from raydfkd.config.load import load_with_method, packaged_methods
from raydfkd.errors import RecipeError, one_line
from raydfkd.images.real_data import Split
from raydfkd.runner.suits import why_not

SHARES = (0.25, 0.5, 1.0)
"""Shares of the budget at which a method is measured, each a run of its own whose schedules end there."""
CONTROLS = {REAL: "real images (control)", NOISE: "noise (control)"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is compared: methods on one recipe's teacher, student and data."""

    recipe: str
    """Recipe whose own method does not count."""
    methods: tuple[str, ...]
    """Packaged methods, or recipes of which only the method counts."""
    budget_s: float
    """Device-seconds for synthesis and student together."""
    seeds: tuple[int, ...]
    split: Split
    shares: tuple[float, ...] = SHARES
    overrides: tuple[str, ...] = ()

    def cells(self) -> list[Cell]:
        """Every run, the whole budget first, so that a table that is stopped half-way says something."""
        return [
            Cell(
                recipe=self.recipe,
                method=method,
                budget_s=round(share * self.budget_s, 3),
                seed=seed,
                split=self.split,
                overrides=self.overrides,
            )
            for share in sorted(self.shares, reverse=True)
            for seed in self.seeds
            for method in dict.fromkeys((*CONTROLS, *self.methods))
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Results of a comparison, and methods that there are none of."""

    comparison: Comparison
    results: tuple[Result, ...]
    left_out: dict[str, str]
    """Why a method does not suit the teacher, or came to nothing."""

    def to_json(self) -> str:
        """Everything, as one object."""
        found = {
            "comparison": asdict(self.comparison),
            "results": [asdict(result) for result in self.results],
            "left_out": self.left_out,
        }
        return json.dumps(found, indent=1)

    def markdown(self) -> str:
        """A row a method, the best first, with the controls in their places: student top-1 in per cent."""
        comparison = self.comparison
        budgets = sorted({result.budget_s for result in self.results})
        teacher = f"{100 * self.results[0].teacher_top1:.1f}" if self.results else "-"
        lines = [
            f"Teacher and student of `{comparison.recipe}`, teacher {teacher} %, {comparison.split} images, seeds "
            f"{', '.join(map(str, comparison.seeds))}; top-1 in per cent, means with ranges.",
            "",
            "| method | " + " | ".join(f"{budget:g} s" for budget in budgets) + " | images | steps | synthesis s |",
            "|---|" + "---|" * (len(budgets) + 3),
        ]
        for method in sorted({result.method for result in self.results if result.method}, key=self._rank):
            rows = [result for result in self.results if result.method == method]
            columns = [[row for row in rows if row.budget_s == budget] for budget in budgets]
            whole = columns[-1]
            cells = [spread([100 * row.student_top1 for row in column], ".1f") for column in columns]
            cells += [
                spread([row.images for row in whole], ",.0f"),
                spread([row.student_steps for row in whole], ",.0f"),
                spread([row.synthesis_seconds for row in whole], ",.0f"),
            ]
            lines.append(f"| {CONTROLS.get(method, f'`{Path(method).stem}`')} | {' | '.join(cells)} |")
        for method, reason in self.left_out.items():
            lines.append(f"\n`{Path(method).stem}` has no row: {reason}")
        return "\n".join(lines)

    def _rank(self, method: str) -> float:
        rows = [result for result in self.results if result.method == method]
        last = max(row.budget_s for row in rows)
        return -statistics.mean(row.student_top1 for row in rows if row.budget_s == last)


def bench_methods(
    comparison: Comparison, folder: Path, *, at_once: int = 1, told: Callable[[Result], None] = lambda _: None
) -> Found:
    """Measure what ``folder`` has no result of yet.

    Args:
        comparison: what is compared.
        folder: results and teachers; the same folder resumes.
        at_once: processes of one thread each.
        told: of each result as it comes.

    Raises:
        RecipeError: the recipe has a mistake, or nobody could judge its student.
    """
    left_out: dict[str, str] = {}
    for method in comparison.methods:
        if method not in CONTROLS:
            reason = why_not(load_with_method(comparison.recipe, method, comparison.overrides))
            if reason:
                left_out[method] = reason

    def failed(cell: Cell, error: Exception) -> None:
        left_out[str(cell.method)] = f"seed {cell.seed}, {cell.budget_s:g} s: {one_line(error)}"

    results = []
    cells = [cell for cell in comparison.cells() if cell.method not in left_out]
    for result in bench_quality(cells, folder, at_once=at_once, on_error=failed):
        told(result)
        results.append(result)
    return Found(comparison=comparison, results=tuple(results), left_out=left_out)


def methods_named(names: Sequence[str]) -> tuple[str, ...]:
    """The methods that are meant; all packaged ones unless some are named.

    Raises:
        RecipeError: one of the controls is named, which are there anyway.
    """
    for name in names:
        if name == REAL:
            raise RecipeError(f"{name} is a control, which is in every table; leave it out")
    return tuple(names) or tuple(packaged_methods())
