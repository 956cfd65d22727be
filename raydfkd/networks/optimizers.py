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
    """Optimiser and learning-rate schedule of a recipe, the latter ``steps`` long.

    ``one_cycle`` cycles momentum against the rate (Smith 2018), 0.05 to either side of the recipe's and less where that
    would leave (0, 1): 0.95, 0.85, 0.95 for 0.9, as PyTorch does it. A warm-up is at least one step, of those below the
    peak, and ``cosine`` falls over the steps that are left.
    """
    optimizer: torch.optim.Optimizer
    if spec.kind == "adam":
        betas = (spec.momentum, 0.999)
        optimizer = torch.optim.AdamW(student.parameters(), lr=spec.lr, betas=betas, weight_decay=spec.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            student.parameters(), lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay, nesterov=True
        )
    if spec.schedule == "one_cycle":
        swing = min(0.05, spec.momentum, (1 - spec.momentum) / 2)
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            spec.lr,
            total_steps=steps + 1,  # one more than is made: it raises when asked for the rate after its last
            base_momentum=round(spec.momentum - swing, 6),  # 0.85 as PyTorch's own, not 0.8500000000000001
            max_momentum=round(spec.momentum + swing, 6),
        )
    if spec.warmup:
        warmup = max(1, round(spec.warmup * steps))
        falls = spec.schedule == "cosine"
        return optimizer, torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, steps=steps, warmup=warmup) if falls or step < warmup else 1.0
        )
    if spec.schedule == "cosine":
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
