"""Slow checks on a local Ray: several training workers, drivers that die. Run by make test-cluster."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

SMALL = (
    "name=small",
    "teacher.options={widths: [4, 8]}",
    "teacher.weights=random",
    "teacher.train=null",
    "real_data=null",
    "student.options={widths: [4]}",
    "synthesis.steps=60",
    "transfer_set.images_per_class=40",
    "transfer_set.unit={classes: 10, images_per_class: 4}",
    "distill.steps=200",
    "distill.checkpoint_every=20",
    "distill.log_every=10",
    "distill.source.wait_for=40",
    "runtime.workers={min: 1, max: 2}",
    "runtime.cpus_per_worker=0.25",
    "runtime.cpus_per_student_worker=0.5",
)


def command(run_dir: Path, *overrides: str) -> list[str]:
    settings = [part for setting in (*SMALL, *overrides) for part in ("--set", setting)]
    call = "from raydfkd.cli import main; main()"
    return [sys.executable, "-c", call, "run", "digits-generators", "--run-dir", str(run_dir), "--json", *settings]


def report_of(result: subprocess.CompletedProcess[str]) -> dict:
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def finish(arguments: list[str]) -> dict:
    return report_of(subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False))


def student_steps(run_dir: Path) -> list[int]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["event"] == "student"]


def units_of_last_session(run_dir: Path) -> int:
    events = [json.loads(line)["event"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return events[::-1][: events[::-1].index("session")].count("unit")


def wait_for_a_checkpoint(run_dir: Path, driver: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if list(run_dir.glob("student-*/checkpoint_*/state.pt")):
            return
        assert driver.poll() is None, "the driver ended before it was to be killed"
        time.sleep(0.1)
    raise AssertionError("no checkpoint within two minutes")


def test_a_student_on_up_to_two_workers_makes_every_step_and_the_set_is_the_same(tmp_path):
    alone = finish(command(tmp_path / "one"))
    both = finish(command(tmp_path / "two", "runtime.student_workers={min: 1, max: 2}"))
    assert alone["content_digest"] == both["content_digest"]
    assert student_steps(tmp_path / "two")[-1] == 200


def test_a_killed_driver_goes_on_from_commits_and_checkpoint(tmp_path):
    arguments = command(tmp_path)
    driver = subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    wait_for_a_checkpoint(tmp_path, driver)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    before = student_steps(tmp_path)
    # Ray's own processes notice the missing driver by themselves; a new cluster starts beside what is left of it.
    report = finish(arguments)
    assert report["units"]["committed"] == 10
    assert units_of_last_session(tmp_path) < 10
    after = student_steps(tmp_path)[len(before) :]
    assert after[-1] == 200
    assert after[0] > 1, "training began anew instead of at its checkpoint"
