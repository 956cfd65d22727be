"""Optimisers and learning-rate schedules."""

from __future__ import annotations

import math

import torch
from torch import nn

from raydfkd.config.schema import OptimizerSpec


def warmup_cosine(step: int, *, steps: int, warmup: int) -> float:
    """Factor on the learning rate at ``step`` (from 0): linear warm-up, then half a cosine to zero (Yin et al.)."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def build_optimizer(
    student: nn.Module, spec: OptimizerSpec, *, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Optimiser and learning-rate schedule of a recipe."""
    optimizer: torch.optim.Optimizer
    if spec.kind == "adam":
        betas = (spec.momentum, 0.999)
        optimizer = torch.optim.AdamW(student.parameters(), lr=spec.lr, betas=betas, weight_decay=spec.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            student.parameters(), lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay, nesterov=True
        )
    if spec.schedule == "one_cycle":
        # One step more than is made: OneCycleLR raises when asked for the rate after its last.
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, spec.lr, total_steps=steps + 1)
    if spec.schedule == "cosine":
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
