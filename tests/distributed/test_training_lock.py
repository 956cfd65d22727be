"""One driver at a time trains a student, and none is held up by one that is gone."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from toy import quiet_events, synthesize_here, toy_recipe, training_of

from raydfkd.checkpoints import checkpoint_bytes, read_checkpoint
from raydfkd.distributed.training_lock import training_lock
from raydfkd.job import open_job

HOLD = """
import sys, time
from pathlib import Path
from raydfkd.distributed.training_lock import training_lock

with training_lock(Path(sys.argv[1]), print, lambda: False):
    print("holds it", flush=True)
    time.sleep(60)
"""


def unexpected(who: str) -> None:
    raise AssertionError(f"{who} holds it")


def test_a_lock_that_is_free_is_not_waited_for(tmp_path):
    for _ in range(2):
        with training_lock(tmp_path / "train" / "lock", unexpected, lambda: True) as has_waited:
            assert not has_waited


def test_who_waits_is_told_for_whom_and_comes_next_when_that_process_is_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holds it\n"
        told = []
        threading.Timer(0.5, holder.send_signal, [signal.SIGKILL]).start()
        began = time.monotonic()
        with training_lock(tmp_path / "lock", told.append, lambda: False) as has_waited:
            assert has_waited
        assert time.monotonic() - began < 5
        assert len(told) == 1
        assert told[0].startswith(f"process {holder.pid} on ")
    finally:
        holder.kill()
        holder.wait()


def test_waiting_ends_when_it_is_over(tmp_path):
    with (
        training_lock(tmp_path / "lock", unexpected, lambda: False),
        pytest.raises(TimeoutError, match="lock was not free in time"),
        training_lock(tmp_path / "lock", lambda who: None, lambda: True),
    ):
        pass


def test_file_system_without_locks_is_gone_on_without_one_and_said(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with training_lock(tmp_path / "lock", unexpected, lambda: True) as has_waited:
        assert not has_waited
    assert "do not run the same recipe twice at once here" in caplog.text


@pytest.mark.ray
@pytest.mark.parametrize("is_listed", [True, False])
def test_checkpoints_are_found_where_their_list_is_missing_or_was_cut_off_and_the_newest_too(is_listed, tmp_path):
    from raydfkd.distributed.train_driver import _newest_in
    from raydfkd.distributed.train_worker import STATE

    assert _newest_in(tmp_path) is None
    if is_listed:
        (tmp_path / "checkpoint_manager_snapshot.json").write_bytes(b"")
    for number, content in enumerate([checkpoint_bytes({"step": torch.tensor(step)}) for step in (1, 2, 3)]):
        folder = tmp_path / f"checkpoint_2026-01-01_00-00-0{number}"
        folder.mkdir()
        (folder / STATE).write_bytes(content if number < 2 else content[: len(content) // 2])
    found = _newest_in(tmp_path)
    assert found is not None
    with found.as_directory() as path:
        assert read_checkpoint((tmp_path / path / STATE).read_bytes())["step"] == 2
    assert not (tmp_path / "checkpoint_manager_snapshot.json").exists(), "Ray Train would refuse to go on from it"


def write_checkpoints(folder, contents):
    """Folders of checkpoints as Ray Train names them, the newest last."""
    names = [f"checkpoint_2026-01-01_00-00-0{number}" for number in range(len(contents))]
    for name, content in zip(names, contents, strict=True):
        (folder / name).mkdir(parents=True)
        (folder / name / "state.pt").write_bytes(content)
    return names


@pytest.mark.ray
@pytest.mark.parametrize("damage", ["cut off", "gone"])
def test_where_the_checkpoint_that_is_listed_as_newest_is_damaged_the_one_before_is_gone_on_from(
    damage, tmp_path, monkeypatch, caplog
):
    from ray.train import Checkpoint

    from raydfkd.distributed import train_driver

    contents = [checkpoint_bytes({"step": torch.tensor(step)}) for step in (1, 2, 3)]
    names = write_checkpoints(tmp_path, contents)
    listed = tmp_path / "checkpoint_manager_snapshot.json"
    listed.write_text("{}")
    newest = tmp_path / names[-1] / "state.pt"

    class Listed:
        checkpoint = Checkpoint.from_directory(newest.parent)

    monkeypatch.setattr(train_driver.Result, "from_path", lambda folder: Listed)
    assert train_driver._newest_in(tmp_path) is Listed.checkpoint
    assert listed.exists()

    if damage == "gone":
        newest.unlink()
    else:
        newest.write_bytes(contents[-1][:100])
    found = train_driver._newest_in(tmp_path)
    assert found is not None
    assert train_driver.read_state(found)["step"] == 2
    assert not listed.exists(), "Ray Train would go on from what it names"
    assert "damaged" in caplog.text
    if damage == "cut off":
        assert newest.with_name("state.pt.damaged").exists()
    assert train_driver.read_state(train_driver._newest_in(tmp_path))["step"] == 2


class Said:
    """Stands for the coordinator."""

    def __init__(self):
        self.lines = []
        self.say = self

    def remote(self, line):
        self.lines.append(line)


@pytest.mark.ray
@pytest.mark.parametrize("has_more", [True, False])
def test_training_that_ended_without_images_that_are_there_now_begins_anew_with_empty_folders(
    has_more, tmp_path, monkeypatch
):
    from raydfkd.distributed import train_driver

    job = open_job(toy_recipe(tmp_path))
    synthesize_here(job, quiet_events(tmp_path))
    states = []
    training_of(job, on_checkpoint=states.append).run()
    seen = 12 if has_more else 24
    states[-1]["trainer"] |= {"snapshot_images": seen, "wanted_images": 24}
    name = f"student-{job.student_digest[:16]}"
    folder = tmp_path / "run" / name
    write_checkpoints(folder, [checkpoint_bytes(states[-1])])
    epoch = tmp_path / "run" / "train" / f"epochs-{job.student_digest[:16]}" / "000000.json"
    epoch.parent.mkdir(parents=True, exist_ok=True)
    epoch.write_text("{}")
    fitted, said = [], Said()

    def fit(job, phase, recipe, name, coordinator, checkpoint):
        fitted.append((checkpoint, folder.exists(), epoch.exists()))

    monkeypatch.setattr(train_driver, "_fit", fit)
    state = train_driver.train_student(job, job.phases[-1], said)
    if has_more:
        assert fitted == [(None, False, False)]
        assert said.lines == ["trains from the beginning: it has seen 12 of 24 images, and now there are 24"]
    else:
        assert (fitted, said.lines) == ([], [])
        assert all(torch.equal(state[key], value) for key, value in states[-1]["student"].items())
        assert epoch.exists()
