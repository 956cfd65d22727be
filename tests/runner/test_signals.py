"""Ctrl-C and SIGTERM: the first asks for an orderly end, the second ends at once."""

from __future__ import annotations

import contextlib
import itertools
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml
from toy import quiet_events, synthesize_here, toy_recipe

from raydfkd.job import open_job
from raydfkd.runner.signals import Interruption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_a_request_and_the_second_ends_at_once(number, capfd):
    with Interruption() as interruption:
        assert (interruption.is_requested, interruption.seconds) == (False, 0.0)
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert interruption.is_requested
        assert 0 < interruption.seconds < 5
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert "the same again stops now" in capfd.readouterr().err


def test_the_display_is_told_once_though_the_signal_came_while_its_lock_was_held(capfd):
    told, lock = [], threading.Lock()

    def show(line):
        with lock:
            told.append(line)

    with Interruption(show) as interruption:
        with lock:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            assert interruption.is_requested
            assert told == []
        until = time.monotonic() + 5
        while not told and time.monotonic() < until:
            time.sleep(0.01)
        assert told == ["stopping within 10 s, what is in work first; the same again stops now"]
    assert capfd.readouterr().err == ""


TWO_BARS = """
import os, signal, time
from functools import partial
from rich.console import Console
from raydfkd.runner.events import Events, Plan
from raydfkd.runner.progress import Display
from raydfkd.runner.signals import Interruption

with Display(Console()) as display:
    events = Events(display)
    events.planned(
        Plan(job="j", training="t", images=80, units=4, images_before=0, units_before=0, student_steps=10)
    )
    events.synthesis_started()
    events.student_started()
    time.sleep(0.5)
    with Interruption(partial(events.say, "stop")):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
"""


def screen(written: str) -> list[str]:
    """What a terminal shows of it: of the escape codes, those that move up and erase a line."""
    lines, row = [""], 0
    for code, line_feed, text in re.findall(r"\x1b\[([?\d;]*[A-Za-z])|([\r\n])|([^\x1b\r\n]+)", written):
        if code.endswith("A"):
            row -= int(code[:-1] or 1)
        elif code == "2K":
            lines[row] = ""
        elif line_feed == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        lines[row] += text
    return lines


def test_line_of_the_first_ctrl_c_stays_on_a_terminal_with_two_live_bars():
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TWO_BARS],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(terminal)
    written = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while chunk := os.read(master, 65536):
            written += chunk
    assert process.wait(60) == 0
    shown = screen(written.decode())
    assert [line for line in shown if "the same again stops now" in line], shown
    assert sum("starting" in line for line in shown) == 2, shown


def test_handlers_that_were_there_return():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interruption():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_on_another_thread_nothing_is_requested():
    found = []

    def work():
        with Interruption() as interruption:
            found.append(interruption.is_requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def test_unit_in_work_is_finished_when_there_is_time_and_no_other_begun(tmp_path, monkeypatch):
    job = open_job(toy_recipe(tmp_path))
    events = quiet_events(tmp_path)
    monkeypatch.setattr(events, "committed", lambda commit, running: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        synthesize_here(job, events)
    assert len(job.transfer_set.committed()) == 1
    assert not job.is_closed


def test_unit_in_work_is_left_with_its_state_saved_when_time_is_up_and_the_set_is_the_same(tmp_path, monkeypatch):
    undisturbed = open_job(toy_recipe(tmp_path / "undisturbed"))
    synthesize_here(undisturbed, quiet_events(tmp_path / "undisturbed"))
    job = open_job(toy_recipe(tmp_path / "disturbed"))
    monkeypatch.setattr("raydfkd.runner.local.FINISH_S", 0.0)
    seconds = Interruption.seconds
    steps = itertools.count()

    def looked_at(self):
        if next(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return seconds.fget(self) or -1.0

    monkeypatch.setattr(Interruption, "seconds", property(looked_at))
    with pytest.raises(KeyboardInterrupt):
        synthesize_here(job, quiet_events(tmp_path / "disturbed"))
    assert job.transfer_set.committed() == set()
    assert job.transfer_set.store.list("resume") == [f"resume/{job.units[0].id}.pt"]
    synthesize_here(job, quiet_events(tmp_path / "disturbed"))
    assert job.snapshot().content_digest() == undisturbed.snapshot().content_digest()
    assert job.transfer_set.store.list("resume") == []


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.cluster), signal.SIGTERM])
def test_command_that_is_interrupted_says_how_to_go_on_and_the_same_command_does(tmp_path, number):
    recipe = toy_recipe(tmp_path, ["transfer_set.images_per_class=300"])
    source = tmp_path / "run.yaml"
    source.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    call = "from raydfkd.cli import main; main()"
    command = [sys.executable, "-c", call, "synthesize", str(source)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    commits = tmp_path / "run" / "transfer_set" / "commits"
    while not (commits.is_dir() and list(commits.iterdir())):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    sent = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - sent < 10
    assert process.returncode == 130
    assert "the same command goes on from there" in errors
    assert "Traceback" not in errors
    assert 0 < len(list(commits.iterdir())) < 200
    shorter = open_job(recipe)
    assert shorter.snapshot().images > 0
