"""Training the student step by step, wherever it runs."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raydfkd.config.schema import DistillSpec
from raydfkd.data.sources import BatchSource, StudentBatch
from raydfkd.distillation.batchnorm import answers_in_both_modes, reestimate
from raydfkd.distillation.criteria import CRITERIA
from raydfkd.distillation.evaluate import top1
from raydfkd.errors import StudentDivergedError
from raydfkd.images.augment import build_augmentations
from raydfkd.images.pixels import PixelRange, nominal_from_uint8
from raydfkd.images.views import views_of
from raydfkd.networks.observed import Observation, ObservedNetwork
from raydfkd.networks.optimizers import build_optimizer
from raydfkd.networks.taps import wrapped
from raydfkd.seeds import derive_seed, rng_from

logger = logging.getLogger(__name__)
Pace = Callable[[int], int]
"""A function from steps made to the place in the learning-rate schedule; the training ends with the schedule."""
Note = Callable[[Tensor], None]
"""Tells a source how far the student's answers to the last batch were from the teacher's, [N]."""
SETTLING_IMAGES, SETTLING_BATCHES = 4096, 32
"""Maximum of images and of batches that BatchNorm statistics are estimated over once the last step is made."""
COMPARED_BATCHES = 4
"""Number of those batches on which training and eval mode are compared."""
WORTH_SAYING = 0.1
"""Share of predictions that eval mode may lose without a word."""


def by_steps(step: int) -> int:
    """One place in the schedule for each step."""
    return step


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """A step that was made."""

    images: Tensor
    """Images [N, C, H, W] as the student saw them."""
    teacher: Tensor
    """The teacher's logits of them [N, K]."""
    student: Tensor
    """The student's logits of them in training mode [N, K], before the step."""
    loss: Tensor


def divergences(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of each image [N] in nats, from logits [N, K]; no gradient is kept of it."""
    with torch.no_grad():
        pointwise = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="none")
        return pointwise.sum(1)


def weighted(observation: Observation, weights: Tensor) -> Observation:
    """The same answers of N images, through which each image's gradient passes times its own one of ``weights`` [N].

    So every criterion that is a mean over images has the gradient of the weighted mean; its value is without weights.
    """

    def through(answer: Tensor) -> Tensor:
        branch = answer.view_as(answer)  # features have the gradient of the logits too, which is weighted already
        if branch.requires_grad:
            factors = weights.view(-1, *[1] * (answer.ndim - 1)).to(answer)
            branch.register_hook(lambda gradient: gradient * factors)
        return branch

    return replace(
        observation,
        logits=through(observation.logits),
        features=None if observation.features is None else through(observation.features),
        layers={path: through(output) for path, output in observation.layers.items()},
    )


def ignore(*_: object) -> None:
    """A hook that does nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepHooks:
    """Functions that are told of a trainer's steps, by their numbers."""

    on_log: Callable[[Mapping[str, float]], None]
    """Receives step, loss, agreement, images_seen and snapshot_images every ``log_every`` steps; agreement is that of
    the student in eval mode, as it will be used, on the images of the step."""
    on_checkpoint: Callable[[int], None] = ignore
    """Called every ``checkpoint_every`` steps and after the last."""
    on_publish: Callable[[int], None] = ignore
    """Called before the first step, every ``publish_every`` steps and after the last; before a checkpoint of the same
    step, so that none is left out after a kill."""
    wants_checkpoint: Callable[[], bool] = lambda: False
    """Asked after each step whether to make a checkpoint out of turn; all ranks answer alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingHooks:
    """Functions that are told of a training, by its states."""

    on_log: Callable[[Mapping[str, float]], None]
    """Receives the learning curve, as that of ``StepHooks`` does."""
    on_checkpoint: Callable[[dict[str, Any]], None] = ignore
    """Receives the state to resume from."""
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

    Random numbers of a step follow from seed, step and rank, so a resumed training makes the same steps. After the last
    one the student's BatchNorm statistics are estimated again, over the batches that would have come next, augmented
    as those before: without augmentation, digits-generators lost two points of accuracy.

    Args:
        student: in its place on the device, wrapped for data parallelism where there are several ranks.
        teacher: frozen; answers for augmented images unless the recipe uses stored logits.
        spec: criterion, optimiser, steps, augmentations.
        pixels: from stored pixels to what the networks see.
        device: of both networks.
        seed: of the augmentations.
        rank: of this process.
        hooks: functions that are told of the steps.
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
        self._network = wrapped(student)
        precision: torch.dtype = getattr(torch, spec.precision)
        self._observed = ObservedNetwork(student, frozen=False, batchnorm="batch", precision=precision).to(device)
        self._in_use = ObservedNetwork(self._network, frozen=False, precision=precision).to(device)
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
        self._snapshot_images = self._wanted_images = 0
        self._is_settled = False
        self.step = 0

    def fit(self, source: BatchSource, *, steps: int, pace: Pace = by_steps) -> None:
        """Make steps until ``pace`` is at ``steps``; the set may grow meanwhile, so there are no epochs.

        Raises:
            StudentDivergedError: the loss or a weight became NaN or infinite; found at log entries and checkpoints.
        """
        if self.step == 0:
            self._hooks.on_publish(0)
        if self.step < steps:
            self._student.train()
            self._make_steps(iter(source), steps, pace, getattr(source, "note", None))
        elif self.step >= self._spec.steps and not self._is_settled:  # interrupted between the two
            self._student.train()
            self._settle(iter(source))
            self._save(is_last=True)

    def _make_steps(self, batches: Iterator[StudentBatch], steps: int, pace: Pace, note: Note | None) -> None:
        for batch in batches:
            made = self._train_step(batch)
            if note is not None:
                note(divergences(made.student, made.teacher).cpu())
            self.step += 1
            self._images_seen += len(batch.labels)
            self._snapshot_images, self._wanted_images = batch.snapshot_images, batch.wanted_images
            position = pace(self.step)
            for _ in range(min(position, self._spec.steps) - self._schedule.last_epoch):
                self._schedule.step()
            is_last = position >= steps
            if is_last and position >= self._spec.steps:
                self._settle(batches)
            if self.step % self._spec.log_every == 0 or self.step == 1 or is_last:
                self._log(made, batch)
            self._save(is_last=is_last)
            if is_last:
                break

    def _log(self, made: _Step, batch: StudentBatch) -> None:
        loss = made.loss.item()
        if not math.isfinite(loss):
            raise self._diverged(f"its loss is {loss}")
        with torch.no_grad():
            student = self._in_use(made.images).logits
        self._hooks.on_log(
            {
                "step": self.step,
                "loss": loss,
                "agreement": top1(student, made.teacher.argmax(1)),
                "images_seen": self._images_seen,
                "snapshot_images": batch.snapshot_images,
            }
        )

    def _save(self, *, is_last: bool) -> None:
        publishes = is_last or self.step % self._spec.publish_every == 0
        if publishes:
            self._refuse_broken_weights()
            self._hooks.on_publish(self.step)
        is_wanted = self._hooks.wants_checkpoint()  # whatever the step is: to ask is to meet the other ranks
        if is_last or is_wanted or self.step % self._spec.checkpoint_every == 0:
            if not publishes:  # else they were just looked at
                self._refuse_broken_weights()
            self._hooks.on_checkpoint(self.step)

    def _refuse_broken_weights(self) -> None:
        state = itertools.chain(self._network.parameters(), self._network.buffers())
        wrong = [~tensor.isfinite().all() for tensor in state if tensor.is_floating_point()]
        if torch.stack(wrong).any():
            raise self._diverged("not all of its weights are finite")

    def _diverged(self, sign: str) -> StudentDivergedError:
        rate = self._spec.optimizer.lr
        return StudentDivergedError(
            f"the student diverged: {sign} at step {self.step:,}; distill.optimizer.lr is {rate:g}, try {rate / 10:g}"
        )

    def _train_step(self, batch: StudentBatch) -> _Step:
        torch.manual_seed(derive_seed(self._seed, "student", self.step, self._rank))  # what a student's dropout draws
        images = self._augmented(batch, self.step)
        teacher = self._ask_teacher(images, batch)
        student = self._observed(images)
        if batch.weights is not None:
            student = weighted(student, batch.weights.to(self._device))
        loss = self._criterion(student, teacher, batch.labels.to(self._device))
        self._optimizer.zero_grad()
        (loss * batch.share).backward()
        self._optimizer.step()
        return _Step(images=images, teacher=teacher.logits, student=student.logits.detach(), loss=loss.detach())

    def _augmented(self, batch: StudentBatch, step: int) -> Tensor:
        rng = rng_from(derive_seed(self._seed, "augment", step, self._rank))
        bare = nominal_from_uint8(batch.images.to(self._device, non_blocking=True))
        if batch.view_seeds is not None:
            return self._pixels.from_nominal(views_of(bare, batch.view_seeds, self._augment))
        return self._pixels.from_nominal(self._augment(bare, rng, progress=min(1.0, step / self._spec.steps)))

    @torch.no_grad()
    def _ask_teacher(self, images: Tensor, batch: StudentBatch) -> Observation:
        if self._spec.teacher_logits == "live" and batch.view_seeds is None:
            return self._teacher(images)
        return Observation(logits=batch.teacher_logits.to(self._device, torch.float32))

    def ask_about_views(self, images: Tensor, seeds: Tensor) -> Tensor:
        """The teacher's logits [N, K], float32 on the CPU, of views of uint8 ``images`` named by ``seeds``."""
        with torch.no_grad():
            bare = nominal_from_uint8(images.to(self._device))
            seen = self._pixels.from_nominal(views_of(bare, seeds, self._augment))
            return self._teacher(seen).logits.cpu()

    def _settle(self, batches: Iterator[StudentBatch]) -> None:
        """Make the BatchNorm statistics those of the finished weights, and warn where they do not suit the student."""
        count = min(SETTLING_BATCHES, math.ceil(SETTLING_IMAGES / self._spec.batch_size))
        compared: list[tuple[Tensor, StudentBatch]] = []

        def seen() -> Iterator[Tensor]:
            for number, batch in enumerate(itertools.islice(batches, count)):
                images = self._augmented(batch, self.step + number)
                compared.extend([(images, batch)] if number < COMPARED_BATCHES else [])
                yield images

        reestimate(self._network, seen())  # which asks for no batch where no layer follows them
        if compared and self._rank == 0:
            self._compare_modes(compared)
        self._is_settled = True

    def _compare_modes(self, shown: list[tuple[Tensor, StudentBatch]]) -> None:
        """Warn where the student in eval mode, as it will be used, agrees far less than it did in training mode."""
        shares = torch.zeros(2)
        for images, batch in shown:
            teacher = self._ask_teacher(images, batch).logits.argmax(1)
            shares += torch.tensor([top1(answer, teacher) for answer in answers_in_both_modes(self._network, images)])
        in_training, in_use = (shares / len(shown)).tolist()
        if in_training - in_use > WORTH_SAYING:
            logger.warning(
                "the student agrees with its teacher on %.0f %% of images while BatchNorm takes their statistics from "
                "the batch, as in training, but on %.0f %% as it will be used; try a larger distill.batch_size",
                100 * in_training,
                100 * in_use,
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a training resumes from, but for the student itself and its source."""
        return {
            "step": self.step,
            "images_seen": self._images_seen,
            "snapshot_images": self._snapshot_images,
            "wanted_images": self._wanted_images,
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "is_settled": self._is_settled,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from ``state``."""
        self.step, self._images_seen = state["step"], state["images_seen"]
        self._snapshot_images = state.get("snapshot_images", 0)  # which earlier versions did not keep
        self._wanted_images = state.get("wanted_images", 0)
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._is_settled = state.get("is_settled", True)  # where it is not said, the last step was the end
