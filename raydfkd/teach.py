"""Training a teacher on real data, for those who have none: the only place where real images train anything."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from raydfkd.devices import cpu_threads, keep_freed_memory
from raydfkd.images import PixelRange
from raydfkd.networks import build_network
from raydfkd.observed import ObservedNetwork
from raydfkd.real_data import RealData
from raydfkd.recipe import Recipe
from raydfkd.schedule import derive_seed
from raydfkd.synthesis.augment import build_augmentations
from raydfkd.synthesis.synthesizer import rng_from


def teach(
    recipe: Recipe, data: RealData, device: torch.device, on_epoch: Callable[[int, float], None]
) -> torch.nn.Module:
    """Train the recipe's teacher on the training split; ``on_epoch`` receives epochs done and the mean loss.

    AdamW on a one-cycle schedule, cross-entropy; images augmented as ``teacher.train.augment`` says.
    """
    spec = recipe.teacher.train
    assert spec is not None, "checked before work begins"
    seed = derive_seed(recipe.seed, "teacher")
    teacher = build_network(recipe.teacher, recipe.teacher, where="teacher", seed=seed).to(device).train()
    teacher.to(memory_format=torch.channels_last)
    observed = ObservedNetwork(teacher, frozen=False, batchnorm="batch", precision=getattr(torch, spec.precision))
    observed.to(device)
    augment = build_augmentations(spec.augment, where="teacher.train.augment")
    pixels = PixelRange(recipe.teacher.image_space, device)
    split = data.load("train")
    rng = rng_from(derive_seed(recipe.seed, "teach"))
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=spec.lr, weight_decay=spec.weight_decay)
    per_epoch = max(1, len(split.labels) // spec.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, spec.lr, total_steps=spec.epochs * per_epoch + 1)
    if device.type == "cpu":
        keep_freed_memory()
    with cpu_threads(spec.threads):
        for epoch in range(spec.epochs):
            total = torch.zeros((), device=device)
            for rows in torch.randperm(len(split.labels), generator=rng).tensor_split(per_epoch):
                images = augment(pixels.from_uint8(split.images[rows].to(device)), rng)
                loss = F.cross_entropy(observed(images).logits, split.labels[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.detach()
            on_epoch(epoch + 1, (total / per_epoch).item())
    return teacher.eval()
