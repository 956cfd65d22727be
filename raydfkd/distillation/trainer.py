"""Training the student step by step, wherever it runs."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raydfkd.config.schema import DistillSpec
from raydfkd.data.sources import StudentBatch
from raydfkd.devices import dtype_of
from raydfkd.distillation.average import WeightAverage
from raydfkd.distillation.batchnorm import answers_in_both_modes, reestimate
from raydfkd.distillation.evaluate import top1
from raydfkd.distillation.loss import LossValue, StudentLoss, connect
from raydfkd.errors import StudentDivergedError
from raydfkd.images.augment import build_augmentations
from raydfkd.images.pixels import PixelRange, nominal_from_uint8
from raydfkd.images.views import views_of
from raydfkd.networks.observed import Observation, ObservedNetwork
from raydfkd.networks.optimizers import build_optimizer
from raydfkd.seeds import derive_seed, rng_from, seed_globally

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
    parts: Mapping[str, Tensor]
    """Values of the criteria by name, where there are several."""


def _joined(values: Sequence[tuple[float, Tensor]]) -> Tensor:
    """A mean over the images of several parts, of which each has a share."""
    return torch.stack([share * value for share, value in values]).sum()


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
    the student in eval mode, as it will be used, on the images of the step. Of several criteria it also receives
    loss.NAME of each that counts there, without its weight."""
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

    def of_student(
        self, student: Callable[[], nn.Module], state: Callable[[], dict[str, Any]], *, is_first: bool
    ) -> StepHooks:
        """The same for its trainer, whose steps are turned into states; ``student`` is the one to publish."""
        publish = self.on_publish
        return StepHooks(
            on_log=self.on_log,
            on_checkpoint=lambda _: self.on_checkpoint(state()),
            on_publish=ignore
            if publish is None or not is_first
            else lambda step: publish(step, student().state_dict()),
            wants_checkpoint=self.wants_checkpoint,
        )


class StudentTrainer:
    """Trains ``student`` against ``teacher`` on the batches of a source.

    Random numbers of a step follow from seed, step and rank, so a resumed training makes the same steps. After the last
    one the BatchNorm statistics of the student in use are estimated again, over the batches that would have come next,
    augmented as those before: without augmentation, digits-generators lost two points of accuracy.

    Connectors between layers that criteria compare are trained along; they are no part of the student.

    Args:
        student: in its place on the device.
        teacher: frozen; answers for augmented images unless the recipe uses stored logits, and tells the layers that
            the criteria read.
        spec: criteria, optimiser, steps, augmentations.
        pixels: from stored pixels to what the networks see.
        device: of both networks.
        seed: of the augmentations.
        rank: of this process.
        hooks: functions that are told of the steps.
        parallel: wraps what is trained for data parallelism, where there are several ranks.
    """

    def __init__(  # noqa: PLR0913 - one value for each sentence above
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
        parallel: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        self._network = student
        self._average = WeightAverage(student, spec.ema) if spec.ema else None
        self._student = parallel(student)
        self._loss = StudentLoss(spec)
        precision = dtype_of(spec.precision, device)
        self._observed = ObservedNetwork(
            self._student,
            taps=self._loss.student_taps,
            frozen=False,
            batchnorm="batch",
            precision=precision,
            name="student",
        ).to(device)
        self._in_use = ObservedNetwork(self.student, frozen=False, precision=precision).to(device)
        self._teacher = teacher
        self._spec = spec
        self._pixels = pixels
        self._device = device
        self._seed, self._rank = seed, rank
        self._augment = build_augmentations(spec.augment, where="distill.augment")
        self._connect(parallel)
        self._trained = nn.ModuleList([self._student, self._loss.connectors])
        self._optimizer, self._schedule = build_optimizer(self._trained, spec.optimizer, steps=spec.steps)
        self._hooks = hooks
        self._images_seen = 0
        self._snapshot_images = self._wanted_images = 0
        self._is_settled = False
        self.step = 0

    @property
    def place(self) -> int:
        """How far the training is along its schedule; the number of its steps unless it has another pace."""
        return int(self._schedule.last_epoch)

    @property
    def student(self) -> nn.Module:
        """The student as it is judged, published and saved: the average over the steps where the recipe wants one."""
        return self._network if self._average is None else self._average.network

    def _connect(self, parallel: Callable[[nn.Module], nn.Module]) -> None:
        if not self._loss.student_taps:
            return
        is_training = self._student.training
        self._student.eval()
        connect(
            self._loss,
            self._observed,
            self._teacher,
            self._pixels.shape,
            device=self._device,
            seed=self._seed,
            parallel=parallel,
        )
        self._student.train(is_training)

    @property
    def _progress(self) -> float:
        """Share of the steps that are made, by their places in the schedule."""
        return min(1.0, self.place / self._spec.steps)

    def fit(self, source: Iterable[StudentBatch], *, steps: int, pace: Pace = by_steps) -> None:
        """Make steps until ``pace`` is at ``steps``; the set may grow meanwhile, so there are no epochs.

        Raises:
            StudentDivergedError: the loss or a weight became NaN or infinite; found at log entries and checkpoints.
        """
        if self.step == 0:
            self._hooks.on_publish(0)
        note = getattr(source, "note", None)
        if self.place < steps:
            self._train_mode()
            self._make_steps(iter(source), steps, pace, note)
        elif self.place >= self._spec.steps and not self._is_settled:  # interrupted between the two
            self._train_mode()
            self._settle(iter(source))
            self._save(is_last=True)

    def _train_mode(self) -> None:
        self._student.train()
        self.student.train()

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
                **{f"loss.{name}": value.item() for name, value in made.parts.items()},
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
        # what a student's dropout draws
        seed_globally(derive_seed(self._seed, "student", self.step, self._rank), self._device)
        images, labels = self._augmented(batch, self.step)
        count = min(self._spec.accumulate, len(images))
        weights = batch.weights if batch.weights is None else batch.weights.to(self._device)
        parts = zip(
            *(rows.tensor_split(count) for rows in (images, labels, batch.teacher_logits)),
            [None] * count if weights is None else weights.tensor_split(count),
            strict=True,
        )
        teachers, students, values = [], [], []
        self._optimizer.zero_grad()
        for number, part in enumerate(parts, start=1):
            share = len(part[0]) / len(images)
            with nullcontext() if number == count else self._without_averaging():
                teacher, student, value = self._learn(
                    *part, share=share * batch.share, is_known=batch.view_seeds is not None
                )
            teachers.append(teacher)
            students.append(student)
            values.append((share, value))
        if self._spec.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._trained.parameters(), self._spec.clip_norm)
        self._optimizer.step()
        if self._average is not None:
            self._average.update(self.step + 1)
        return _Step(
            images=images,
            teacher=torch.cat(teachers),
            student=torch.cat(students),
            loss=_joined([(share, value.total.detach()) for share, value in values]),
            parts={
                name: _joined([(share, value.parts[name]) for share, value in values]) for name in values[0][1].parts
            },
        )

    def _learn(
        self, images: Tensor, labels: Tensor, stored: Tensor, weights: Tensor | None, *, share: float, is_known: bool
    ) -> tuple[Tensor, Tensor, LossValue]:
        """Add the gradients of a part of a step's images; returns both networks' logits of them, and their loss."""
        teacher, student = self._ask_teacher(images, stored, is_known=is_known), self._observed(images)
        if weights is not None:
            student = weighted(student, weights)
        value = self._loss(student, teacher, labels, progress=self._progress)
        (value.total * share).backward()
        return teacher.logits, student.logits.detach(), value

    @contextmanager
    def _without_averaging(self) -> Iterator[None]:
        """Gradients stay on each rank, to be averaged with those of the step's last part, which are as many there."""
        with ExitStack() as stack:
            for module in (self._student, *self._loss.connectors.values()):
                if isinstance(module, nn.parallel.DistributedDataParallel):
                    stack.enter_context(module.no_sync())
            yield

    def _augmented(self, batch: StudentBatch, step: int) -> tuple[Tensor, Tensor]:
        """Images as the networks see them, and their labels: numbers [N], or shares of classes [N, K] where mixed."""
        rng = rng_from(derive_seed(self._seed, "augment", step, self._rank))
        bare = self._pixels.enlarged(nominal_from_uint8(batch.images.to(self._device, non_blocking=True)))
        labels = batch.labels.to(self._device)
        if batch.view_seeds is not None:
            return self._pixels.normalized(views_of(bare, batch.view_seeds, self._augment)), labels
        images, labels = self._augment.with_labels(
            bare, labels, rng, classes=batch.teacher_logits.shape[1], progress=self._progress
        )
        return self._pixels.normalized(images), labels

    @torch.no_grad()
    def _ask_teacher(self, images: Tensor, stored: Tensor, *, is_known: bool) -> Observation:
        if self._spec.teacher_logits == "live" and not is_known:
            return self._teacher(images)
        return Observation(logits=stored.to(self._device, torch.float32))

    def ask_about_views(self, images: Tensor, seeds: Tensor) -> Tensor:
        """The teacher's logits [N, K], float32 on the CPU, of views of uint8 ``images`` named by ``seeds``."""
        with torch.no_grad():
            bare = nominal_from_uint8(images.to(self._device))
            seen = self._pixels.normalized(views_of(self._pixels.enlarged(bare), seeds, self._augment))
            return self._teacher(seen).logits.cpu()

    def _settle(self, batches: Iterator[StudentBatch]) -> None:
        """Make the BatchNorm statistics those of the finished weights, and warn where they do not suit the student."""
        count = min(SETTLING_BATCHES, math.ceil(SETTLING_IMAGES / self._spec.batch_size))
        compared: list[tuple[Tensor, StudentBatch]] = []

        def seen() -> Iterator[Tensor]:
            for number, batch in enumerate(itertools.islice(batches, count)):
                images, _ = self._augmented(batch, self.step + number)
                compared.extend([(images, batch)] if number < COMPARED_BATCHES else [])
                yield images

        reestimate(self.student, seen())  # which asks for no batch where no layer follows them
        if compared and self._rank == 0:
            self._compare_modes(compared)
        self._is_settled = True

    def _compare_modes(self, shown: list[tuple[Tensor, StudentBatch]]) -> None:
        """Warn where the student in eval mode, as it will be used, agrees far less than it did in training mode."""
        shares = torch.zeros(2)
        for images, batch in shown:
            known = batch.view_seeds is not None
            teacher = self._ask_teacher(images, batch.teacher_logits, is_known=known).logits.argmax(1)
            shares += torch.tensor([top1(answer, teacher) for answer in answers_in_both_modes(self.student, images)])
        in_training, in_use = (shares / len(shown)).tolist()
        if in_training - in_use > WORTH_SAYING:
            logger.warning(
                "the student agrees with its teacher on %.0f %% of images while BatchNorm takes their statistics from "
                "the batch, as in training, but on %.0f %% as it will be used; try a larger distill.batch_size",
                100 * in_training,
                100 * in_use,
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a training resumes from, but for ``student`` and the source."""
        weights = {} if self._average is None else {"weights": self._network.state_dict()}
        connectors = self._loss.state_dict()
        return {
            **weights,
            **({"connectors": connectors} if connectors else {}),
            "step": self.step,
            "images_seen": self._images_seen,
            "snapshot_images": self._snapshot_images,
            "wanted_images": self._wanted_images,
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "is_settled": self._is_settled,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from ``state``, once ``student`` has."""
        if self._average is not None:
            self._network.load_state_dict(state["weights"])
        self._loss.load_state_dict(state.get("connectors", {}))
        self.step, self._images_seen = state["step"], state["images_seen"]
        self._snapshot_images = state.get("snapshot_images", 0)  # which earlier versions did not keep
        self._wanted_images = state.get("wanted_images", 0)
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._is_settled = state.get("is_settled", True)  # where it is not said, the last step was the end
