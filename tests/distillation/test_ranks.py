"""Two processes that train one student together, without Ray."""

from __future__ import annotations

import json

import pytest
import torch
from torch import multiprocessing, nn
from toy import SPACE, batchnorm_teacher, plain_teacher

from raydfkd.config.schema import DistillSpec
from raydfkd.data.sources import StudentBatch
from raydfkd.distillation.loss import StudentLoss
from raydfkd.distillation.trainer import StepHooks, StudentTrainer, ignore
from raydfkd.images.pixels import PixelRange
from raydfkd.networks.observed import ObservedNetwork

STEPS = 6
SETTINGS = {
    "steps": STEPS,
    "criterion": [
        {"kind": "hint", "until": 0.5},
        {"kind": "attention_transfer", "student": "body.0", "teacher": "body.0.1", "until": 0.7, "weight": 10.0},
        {"kind": "soft_kl", "from": 0.3},
    ],
    "optimizer": {"lr": 0.05, "schedule": "cosine", "warmup": 0.3},
    "accumulate": 3,
    "clip_norm": 0.5,
    "ema": 0.8,
}
RANKS = [slice(0, 2), slice(2, 16)]
"""Images of a step that each rank has: fewer than there are parts, and the others."""


def batch_of(step, rows, share):
    rng = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8, generator=rng)[rows]
    logits = torch.randn(16, 4, generator=rng)[rows].half()
    return StudentBatch(images=images, labels=logits.argmax(1), teacher_logits=logits, share=share, snapshot_images=16)


def trained(rows, *, share=1.0, rank=0, parallel=lambda module: module):
    """State of a training on ``rows`` of each step's images."""
    spec = DistillSpec.model_validate_json(json.dumps(SETTINGS))
    trainer = StudentTrainer(
        plain_teacher(seed=1),
        ObservedNetwork(batchnorm_teacher(), taps=StudentLoss(spec).teacher_taps, frozen=True),
        spec,
        pixels=PixelRange(SPACE),
        device=torch.device("cpu"),
        seed=1,
        rank=rank,
        hooks=StepHooks(on_log=ignore),
        parallel=parallel,
    )
    trainer.fit([batch_of(step, rows, share) for step in range(STEPS)], steps=STEPS)
    state = trainer.state_dict()
    return {"student": trainer.student.state_dict(), "weights": state["weights"], "connector": state["connectors"]["0"]}


def train_as(rank, folder):
    """One of the processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=len(RANKS))
    rows = RANKS[rank]
    share = (rows.stop - rows.start) * len(RANKS) / 16
    state = trained(rows, share=share, rank=rank, parallel=nn.parallel.DistributedDataParallel)
    torch.save(state, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_two_processes_make_the_steps_of_one_with_all_images(tmp_path):
    """With criteria that take turns, a connector, an average, clipped gradients and batches in parts."""
    multiprocessing.spawn(train_as, (str(tmp_path),), nprocs=len(RANKS))
    expected = trained(slice(0, 16))
    for rank in range(len(RANKS)):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, rtol=1e-3, atol=1e-5)
