"""Training a teacher on real data, for those who have none: the only place where real images train anything."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import nn
from torch.nn import functional as F

from raydfkd.config.recipe import Recipe
from raydfkd.config.schema import is_file
from raydfkd.devices import cpu_threads, dtype_of, keep_freed_memory, pick_device
from raydfkd.distillation.evaluate import batch_size, judge
from raydfkd.errors import RecipeError
from raydfkd.images.augment import build_augmentations
from raydfkd.images.pixels import PixelRange, nominal_from_uint8
from raydfkd.images.real_data import RealData, Split, in_memory, open_real_data
from raydfkd.networks.layout import lay_channels_last
from raydfkd.networks.observed import ObservedNetwork
from raydfkd.networks.teacher import Teacher, build_teacher, open_teacher, taught_teacher
from raydfkd.networks.weights import save_bytes, weights_exist
from raydfkd.runner.events import Events
from raydfkd.runner.judge import Broken, skipped_line
from raydfkd.seeds import derive_seed, rng_from
from raydfkd.store.store import Store

logger = logging.getLogger(__name__)


def check_teaching(recipe: Recipe) -> RealData:
    """Find mistakes in the keys that training the teacher needs; the rest of the recipe may still be unfinished.

    Returns the data that it is trained on.
    """
    if recipe.teacher.train is None or recipe.real_data is None:
        raise RecipeError("teacher.train is missing, so there is nothing to teach; say how, or give teacher.weights")
    if not is_file(recipe.teacher.weights):
        raise RecipeError(
            f'teacher.weights is "{recipe.teacher.weights}", which nothing is trained for; give the file to write'
        )
    build_augmentations(
        recipe.teacher.train.augment, where="teacher.train.augment", label_reader="the teacher's training"
    )
    data = judging_data(recipe)
    if "train" not in data.splits:
        raise RecipeError(
            f"teacher.train: {recipe.real_data.kind} has no train images here, only {' and '.join(data.splits)}; give "
            "real_data.splits (`raydfkd show real_data`)"
        )
    Store(_split(recipe.teacher.weights)[0]).probe("the folder of teacher.weights")
    return data


def judging_data(recipe: Recipe) -> RealData:
    """Open the recipe's real data, which judge its student and may train its teacher.

    Raises:
        RecipeError: they are not there, or do not fit the teacher.
    """
    assert recipe.real_data is not None, "there are some"
    teacher = recipe.teacher
    names = None if teacher.class_names is None else recipe.class_names
    return open_real_data(recipe.real_data, teacher.image_space, teacher.classes, names)


def teach(recipe: Recipe, events: Events, network: nn.Module | None = None, *, anew: bool = True) -> Teacher:
    """Train the recipe's teacher, the ``network`` that was built for it or a fresh one, and write its weights.

    ``anew`` replaces weights that are there. Else those that another run has written meanwhile are taken: all runs that
    share a file have the same teacher, whoever was first, even where their machines do not compute alike.

    Raises:
        RecipeError: the recipe does not say how, or its data are not there.
    """
    data = check_teaching(recipe)
    with _one_at_a_time(recipe.teacher.weights, events):
        if not anew and weights_exist(recipe.teacher.weights, where="teacher.weights"):
            return open_teacher(recipe, network)
        return _taught(recipe, events, data, network, anew=anew)


@contextmanager
def _one_at_a_time(path: str, events: Events) -> Iterator[None]:
    """Hold off others who want to train the weights at ``path``, where that is a file on a disk that has locks.

    Elsewhere all of them train, which costs time and nothing else.
    """
    if "://" in path:
        yield
        return
    folder, name = _split(path)
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(folder) / f".{name}.lock", fallback_to_soft=False)
    with suppress(OSError):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            events.say("teacher", f"another run trains it; waiting for {path}")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)  # two who hold it after that are told apart as without a lock


def _taught(recipe: Recipe, events: Events, data: RealData, network: nn.Module | None, *, anew: bool) -> Teacher:
    spec, real = recipe.teacher.train, recipe.real_data
    assert spec is not None
    assert real is not None
    network = build_teacher(recipe) if network is None else network
    started, device = time.monotonic(), pick_device(recipe.runtime.driver_device)

    def on_epoch(epoch: int, loss: float) -> None:
        if epoch == spec.epochs or epoch % max(1, spec.epochs // 5) == 0:
            events.say("teacher", f"epoch {epoch} of {spec.epochs}   loss {loss:.3f}")

    train_on_real_data(recipe, network, data, device, on_epoch)
    path, content = recipe.teacher.weights, save_bytes(network, {"network": recipe.teacher.network})
    folder, name = _split(path)
    store = Store(folder)
    if anew:
        store.put(name, content)
    elif not store.put_new(name, content):
        events.say("teacher", f"another run was faster; its weights are taken   {path}")
        return open_teacher(recipe, network.cpu())
    split: Split = "validation" if "validation" in data.splits else "test"
    space = recipe.teacher.image_space
    batches = data.load(split).batches(batch_size(space))
    found = judge(network, network, batches, PixelRange(space, device), classes=recipe.teacher.classes).teacher
    assert found is not None, "real images have labels"
    events.say(
        "teacher",
        f"{recipe.teacher.network} trained on real {real.kind} in {time.monotonic() - started:.0f} s, "
        f"{found.top1:.1%} on the {split} split   {path}",
    )
    return taught_teacher(network.cpu(), content)


def train_on_real_data(
    recipe: Recipe,
    network: nn.Module,
    data: RealData,
    device: torch.device,
    on_epoch: Callable[[int, float], None],
) -> None:
    """Train ``network`` on the training split; ``on_epoch`` receives epochs done and the mean loss.

    AdamW on a one-cycle schedule, cross-entropy; images augmented as ``teacher.train.augment`` says. The whole split is
    in memory, at the teacher's size.
    """
    spec = recipe.teacher.train
    assert spec is not None, "checked before work begins"
    network.to(device).train()
    lay_channels_last(network)
    observed = ObservedNetwork(network, frozen=False, batchnorm="batch", precision=dtype_of(spec.precision, device))
    observed.to(device)
    augment = build_augmentations(spec.augment, where="teacher.train.augment", label_reader="the teacher's training")
    pixels = PixelRange(recipe.teacher.image_space, device)
    broken = Broken()
    split = in_memory(data.load("train"), broken.add)
    for line in skipped_line(asdict(broken)):
        logger.warning("%s", line)
    rng = rng_from(derive_seed(recipe.seed, "teach"))
    optimizer = torch.optim.AdamW(network.parameters(), lr=spec.lr, weight_decay=spec.weight_decay)
    per_epoch = max(1, len(split.labels) // spec.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, spec.lr, total_steps=spec.epochs * per_epoch + 1)
    if device.type == "cpu":
        keep_freed_memory()
    with cpu_threads(spec.threads):
        for epoch in range(spec.epochs):
            progress = epoch / spec.epochs
            total = torch.zeros((), device=device)
            for rows in torch.randperm(len(split.labels), generator=rng).tensor_split(per_epoch):
                bare = nominal_from_uint8(split.images[rows].to(device))
                images = pixels.from_nominal(augment(bare, rng, progress=progress))
                loss = F.cross_entropy(observed(images).logits, split.labels[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.detach()
            on_epoch(epoch + 1, (total / per_epoch).item())
    network.eval()


def _split(path: str) -> tuple[str, str]:
    """Folder and name of a file at a path or URL."""
    folder, slash, name = path.rpartition("/")
    return folder or slash or ".", name
