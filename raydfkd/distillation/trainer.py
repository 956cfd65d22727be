"""Training the student, step by step; no idea where it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raydfkd.config.schema import DistillSpec
from raydfkd.data.sources import BatchSource, StudentBatch
from raydfkd.distillation.criteria import CRITERIA
from raydfkd.images.augment import build_augmentations
from raydfkd.images.pixels import PixelRange
from raydfkd.networks.observed import Observation, ObservedNetwork
from raydfkd.networks.optimizers import build_optimizer
from raydfkd.seeds import derive_seed, rng_from


def ignore(*_: object) -> None:
    """A hook of nobody's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepHooks:
    """Who is told of a trainer's steps, by their numbers."""

    on_log: Callable[[Mapping[str, float]], None]
    """Receives step, loss, agreement, images_seen and snapshot_images every ``log_every`` steps."""
    on_checkpoint: Callable[[int], None] = ignore
    """Called every ``checkpoint_every`` steps and after the last."""
    on_publish: Callable[[int], None] = ignore
    """Called before the first step, every ``publish_every`` steps and after the last; before a checkpoint of the same
    step, so that none is left out after a kill."""
    wants_checkpoint: Callable[[], bool] = lambda: False
    """Asked after each step whether to make a checkpoint out of turn; all ranks answer alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingHooks:
    """Who is told of a training, by its states."""

    on_log: Callable[[Mapping[str, float]], None]
    """Receives the learning curve, see StepHooks."""
    on_checkpoint: Callable[[dict[str, Any]], None] = ignore
    """Receives the state to go on from."""
    on_publish: Callable[[int, Mapping[str, Tensor]], None] | None = None
    """Receives versions of the student and its state dict, on the first rank only: number of steps and tensors. The
    tensors are the student's own; they change with the next step."""
    wants_checkpoint: Callable[[], bool] = lambda: False
    """Asked after each step whether to make a checkpoint out of turn; all ranks answer alike."""

    def of_student(self, student: nn.Module, state: Callable[[], dict[str, Any]], *, is_first: bool) -> StepHooks:
        """The same for its trainer, whose steps are turned into states."""
        publish = self.on_publish
        return StepHooks(
            on_log=self.on_log,
            on_checkpoint=lambda _: self.on_checkpoint(state()),
            on_publish=ignore if publish is None or not is_first else lambda step: publish(step, student.state_dict()),
            wants_checkpoint=self.wants_checkpoint,
        )


class StudentTrainer:
    """Trains ``student`` against ``teacher`` on the batches of a source.

    Random numbers of a step follow from seed, step and rank, so a resumed training makes the same steps.

    Args:
        student: in its place on the device, wrapped for data parallelism where there are several ranks.
        teacher: frozen; answers for augmented images unless the recipe uses stored logits.
        spec: criterion, optimiser, steps, augmentations.
        pixels: from stored pixels to what the networks see.
        device: of both networks.
        seed: of the augmentations.
        rank: of this process.
        hooks: who is told what.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: ObservedNetwork,
        spec: DistillSpec,
        *,
        pixels: PixelRange,
        device: torch.device,
        seed: int,
        rank: int = 0,
        hooks: StepHooks,
    ) -> None:
        self._student = student
        precision: torch.dtype = getattr(torch, spec.precision)
        self._observed = ObservedNetwork(student, frozen=False, batchnorm="batch", precision=precision).to(device)
        self._teacher = teacher
        self._spec = spec
        self._pixels = pixels
        self._device = device
        self._seed, self._rank = seed, rank
        self._criterion = CRITERIA.build(spec.criterion.kind, spec.criterion.options, where="distill.criterion")
        self._augment = build_augmentations(spec.augment, where="distill.augment")
        self._optimizer, self._schedule = build_optimizer(student, spec.optimizer, steps=spec.steps)
        self._hooks = hooks
        self._images_seen = 0
        self.step = 0

    def fit(self, source: BatchSource, *, steps: int) -> None:
        """Make steps until ``steps`` are done in all; the set may grow meanwhile, so there are no epochs."""
        if self.step == 0:
            self._hooks.on_publish(0)
        if self.step >= steps:
            return
        self._student.train()
        for batch in source:
            loss, agreement = self._train_step(batch)
            self.step += 1
            self._images_seen += len(batch.labels)
            if self.step % self._spec.log_every == 0 or self.step in (1, steps):
                self._hooks.on_log(
                    {
                        "step": self.step,
                        "loss": loss.item(),
                        "agreement": agreement.item(),
                        "images_seen": self._images_seen,
                        "snapshot_images": batch.snapshot_images,
                    }
                )
            self._save(is_last=self.step >= steps)
            if self.step >= steps:
                break

    def _save(self, *, is_last: bool) -> None:
        if is_last or self.step % self._spec.publish_every == 0:
            self._hooks.on_publish(self.step)
        is_wanted = self._hooks.wants_checkpoint()  # whatever the step is: to ask is to meet the other ranks
        if is_last or is_wanted or self.step % self._spec.checkpoint_every == 0:
            self._hooks.on_checkpoint(self.step)

    def _train_step(self, batch: StudentBatch) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(derive_seed(self._seed, "student", self.step, self._rank))  # what a student's dropout draws
        rng = rng_from(derive_seed(self._seed, "augment", self.step, self._rank))
        images = self._augment(self._pixels.from_uint8(batch.images.to(self._device, non_blocking=True)), rng)
        with torch.no_grad():
            if self._spec.teacher_logits == "live":
                teacher = self._teacher(images)
            else:
                teacher = Observation(logits=batch.teacher_logits.to(self._device, torch.float32))
        student = self._observed(images)
        loss = self._criterion(student, teacher, batch.labels.to(self._device))
        self._optimizer.zero_grad()
        (loss * batch.share).backward()
        self._optimizer.step()
        self._schedule.step()
        return loss.detach(), (student.logits.argmax(1) == teacher.logits.argmax(1)).float().mean()

    def state_dict(self) -> dict[str, Any]:
        """Everything that training goes on from, but for the student itself and its source."""
        return {
            "step": self.step,
            "images_seen": self._images_seen,
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self.step, self._images_seen = state["step"], state["images_seen"]
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
