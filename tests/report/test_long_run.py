"""The report of a long run: it takes no more memory than that of a short one, and its curves are those of the run."""

from __future__ import annotations

import random
import tracemalloc

import pytest
from long_run import LOOKS, read_and_render, write_metrics

from raydfkd.report import charts
from raydfkd.report.charts import Curves
from raydfkd.report.metrics import read_metrics


def peak_of(path):
    tracemalloc.start()
    try:
        read_and_render(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def curves_of(events):
    curves = Curves()
    for event in events:
        curves.add(event)
    return curves


@pytest.mark.cluster
def test_memory_for_the_report_does_not_grow_with_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "MAX_ENTRIES", 1_000)
    peaks = []
    for units in (40, 160):
        write_metrics(tmp_path / "metrics.jsonl", units, student_steps=25 * units)
        images, page = read_and_render(tmp_path / "metrics.jsonl")
        assert images == 10 * units
        assert "bn_moments over steps" in page
        peaks.append(peak_of(tmp_path / "metrics.jsonl"))
    assert peaks[1] < 1.3 * peaks[0]


def test_curves_of_many_units_are_those_of_some_whole_ones_whatever_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "MAX_ENTRIES", 10 * LOOKS)
    write_metrics(tmp_path / "metrics.jsonl", 64, student_steps=1)
    events = [event for event in read_metrics(tmp_path / "metrics.jsonl") if event["event"] == "objective"]
    curves = curves_of(events)
    random.Random(1).shuffle(events)
    assert curves_of(events).objective() == curves.objective()
    kept = curves._units
    assert 0 < len(kept) <= 10
    assert {len(entries) for entries in kept.values()} == {LOOKS}
    assert curves_of(event for event in events if event["unit"] in kept).objective() == curves.objective()


def test_long_curve_of_a_student_keeps_its_ends_and_as_many_steps_as_can_be_seen(monkeypatch):
    monkeypatch.setattr(charts, "MAX_ENTRIES", 500)
    for last in (499, 500, 501, 5_000):
        curves = curves_of({"event": "student", "step": step, "loss": float(step)} for step in range(last + 1))
        steps = sorted(curves._student)
        assert (steps[0], steps[-1]) == (0, last)
        assert charts.MAX_POINTS < len(steps) <= 500 + 1
        (chart,) = curves.student()
        assert (chart.first, chart.last) == ("0", charts._short(last))


@pytest.mark.parametrize("block", [7, 64, 1 << 16])
def test_end_of_a_long_file_that_was_cut_off_is_found_block_by_block(tmp_path, monkeypatch, block):
    from raydfkd.report import metrics

    monkeypatch.setattr(metrics, "BLOCK_BYTES", block)
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, 2, student_steps=3)
    whole = path.read_bytes()
    for torn in (b"", b"{", b'{"event": "' + b"x" * 100):
        path.write_bytes(whole + torn)
        with metrics.MetricsLog(path, fresh=False):
            assert path.read_bytes() == whole
    path.write_bytes(b"no line at all" * 10)
    with metrics.MetricsLog(path, fresh=False) as log:
        assert path.read_bytes() == b""
        log.write("unit", unit="u0")
    assert [event["unit"] for event in read_metrics(path)] == ["u0"]
