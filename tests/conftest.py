"""Its presence makes pytest put this folder on the path, so that tests in all subfolders can import ``toy``."""

import functools
import itertools
import os
import uuid

import pytest
import torch
import typer
from hypothesis import settings

from raydfkd.data.batches import SyntheticBatch
from raydfkd.runner import evidence

# Toy sizes gain nothing from more, and threads that wait take time from other processes. From the first import on,
# because tests are made of networks; the second line is for programs that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Else each call of the command line within a process puts all commands together again.
typer.main.get_command = functools.cache(typer.main.get_command)

settings.register_profile("same examples each time", derandomize=True)
settings.load_profile("same examples each time")


@pytest.fixture(params=["local", "memory"])
def uri(request, tmp_path):
    """An empty place of each kind."""
    return str(tmp_path / "set") if request.param == "local" else f"memory://{uuid.uuid4().hex}/set"


@pytest.fixture
def short_evidence(monkeypatch):
    """The images that students are judged on without real ones take two steps each."""
    for steps in ("GENERATOR_STEPS", "RENEWAL_STEPS"):
        monkeypatch.setattr(evidence, steps, 2)


@pytest.fixture
def make_batch():
    """Makes batches of ``count`` 3 x 4 x 5 images and 7 classes, each unlike the others."""
    seeds = itertools.count()

    def make(count, *, objective=1.0, student_version=-1):
        rng = torch.Generator().manual_seed(next(seeds))
        return SyntheticBatch(
            images=torch.randint(0, 256, (count, 3, 4, 5), dtype=torch.uint8, generator=rng),
            labels=torch.randint(0, 7, (count,), generator=rng),
            teacher_logits=torch.randn(count, 7, generator=rng).half(),
            objective=objective,
            student_version=student_version,
        )

    return make
