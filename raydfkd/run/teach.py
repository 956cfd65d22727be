"""Training a teacher on real data, for those who have none: the only place where real images train anything."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from raydfkd.config.recipe import Recipe
from raydfkd.devices import cpu_threads, keep_freed_memory, pick_device
from raydfkd.errors import RecipeError
from raydfkd.images.augment import build_augmentations
from raydfkd.images.pixels import PixelRange
from raydfkd.images.real_data import RealData, open_real_data
from raydfkd.networks.build import build_network
from raydfkd.networks.layout import lay_channels_last
from raydfkd.networks.observed import ObservedNetwork
from raydfkd.networks.weights import save_bytes, weights_exist
from raydfkd.run.progress import Monitor
from raydfkd.seeds import derive_seed, rng_from
from raydfkd.store.store import Store


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
    lay_channels_last(teacher)
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


def check_teacher(recipe: Recipe) -> None:
    """Find mistakes in what it takes to train the teacher; the rest of the recipe may still be unfinished."""
    if recipe.teacher.train is None or recipe.real_data is None:
        raise RecipeError("teacher.train is missing, so there is nothing to teach; say how, or give teacher.weights")
    if recipe.teacher.weights == "random":
        raise RecipeError('teacher.weights is "random", which nothing is trained for; give the file to write')
    build_network(recipe.teacher, recipe.teacher, where="teacher", seed=0)
    build_augmentations(recipe.teacher.train.augment, where="teacher.train.augment")
    open_real_data(recipe.real_data, recipe.teacher.image_space, recipe.teacher.classes)
    Store(_split(recipe.teacher.weights)[0]).probe("the folder of teacher.weights")


def ensure_teacher(recipe: Recipe, monitor: Monitor, *, again: bool = False) -> None:
    """Train the teacher if its weights are not there yet and the recipe says how."""
    if weights_exist(recipe.teacher.weights, where="teacher.weights") and not again:
        return
    from raydfkd.distill.evaluate import judge, predict  # torchmetrics, which takes longer to import than torch

    check_teacher(recipe)
    spec, real = recipe.teacher.train, recipe.real_data
    assert spec is not None
    assert real is not None
    data = open_real_data(real, recipe.teacher.image_space, recipe.teacher.classes)
    started = time.monotonic()
    device = pick_device(recipe.runtime.device)

    def on_epoch(epoch: int, loss: float) -> None:
        if epoch == spec.epochs or epoch % max(1, spec.epochs // 5) == 0:
            monitor.say("teacher", f"epoch {epoch} of {spec.epochs}   loss {loss:.3f}")

    teacher = teach(recipe, data, device, on_epoch)
    path = recipe.teacher.weights
    folder, name = _split(path)
    Store(folder).put(name, save_bytes(teacher, {"network": recipe.teacher.network}))
    validation = data.load("validation")
    pixels = PixelRange(recipe.teacher.image_space, device)
    logits = predict(teacher, validation.images, pixels)
    top1 = dict(judge(logits, logits, validation.labels))["teacher.top1"]
    monitor.say(
        "teacher",
        f"{recipe.teacher.network} trained on real {real.kind} in {time.monotonic() - started:.0f} s, "
        f"{top1:.1%} on the validation split   {path}",
    )


def _split(path: str) -> tuple[str, str]:
    """Folder and name of a file at a path or URL."""
    folder, slash, name = path.rpartition("/")
    return folder or slash or ".", name
