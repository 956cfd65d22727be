"""Checkpoints are data: what cannot be read is a ValueError, and what is in them runs nowhere."""

from __future__ import annotations

import io
import pickle
import sys

import pytest
import torch
from toy import toy_recipe

from raydfkd.checkpoints import checkpoint_bytes, read_checkpoint
from raydfkd.distillation.training import StudentCheckpoint
from raydfkd.job import open_job
from raydfkd.synthesis.checkpoint import UnitCheckpoint


class Bomb:
    """Leaves a mark when somebody unpickles it."""

    def __reduce__(self):
        return exec, ("import sys; sys.raydfkd_checkpoint_was_here = True",)


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


WHOLE = checkpoint_bytes({"step": 3, "weights": torch.arange(100)})
NO_CHECKPOINTS = {
    "empty": b"",
    "cut off": WHOLE[: len(WHOLE) // 2],
    "without its end": WHOLE[:-1],
    "text": b"step: 3\n",
    "list": saved([1, 2]),
    "pickle": pickle.dumps(Bomb()),
    "pickle in torch's format": saved({"step": Bomb()}),
}


@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_a_mistake_of_value_and_runs_no_code(name, tmp_path, caplog):
    content = NO_CHECKPOINTS[name]
    with pytest.raises(ValueError, match="checkpoint"):
        read_checkpoint(content)
    job = open_job(toy_recipe(tmp_path))
    job.transfer_set.store.put(f"resume/{job.units[0].id}.pt", content)
    assert UnitCheckpoint(job.transfer_set.store, job.units[0], job.digest).load() is None
    student = tmp_path / "run" / "train" / f"student-{job.student_digest[:16]}.pt"
    student.parent.mkdir(parents=True)
    student.write_bytes(content)
    assert StudentCheckpoint(job).load() is None
    assert len(caplog.records) == 3
    assert not hasattr(sys, "raydfkd_checkpoint_was_here")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_checkpoint_for_which_there_is_no_memory_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    job = open_job(toy_recipe(tmp_path))
    StudentCheckpoint(job).save({"student": {}, "trainer": {}, "source": {}})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fail)
        with pytest.raises(type(error)):
            StudentCheckpoint(job).load()
    assert StudentCheckpoint(job).load() == {"student": {}, "trainer": {}, "source": {}}
