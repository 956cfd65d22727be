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

from raydfkd.checkpoints import checkpoint_bytes, read_checkpoint
from raydfkd.distributed.training_lock import training_lock

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
