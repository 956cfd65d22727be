"""Batches from a generator that is trained against the student as it learns (adversarial methods)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from raydfkd.config.schema import Count, Positive
from raydfkd.data.batches import SyntheticBatch
from raydfkd.data.sources import SOURCES, Feed, StudentBatch
from raydfkd.errors import RecipeError
from raydfkd.seeds import derive_seed
from raydfkd.units import Request, WorkUnit


@SOURCES.register("live")
class LiveSource:
    """Trains the generator of the recipe's synthesis between the student's steps, and draws each batch from it.

    Generator and student are on every training worker; each worker draws its own latents, and the generator's
    gradients are averaged as the student's are, so two workers make the steps of one with twice the batch. Source:
    Fang et al. 2019 (DFAD), one generator step before every five of the student.

    Args:
        generator_steps: steps of the generator before each run of student steps.
        student_steps: student steps in a row.
        same_batch: make those steps on one batch, as Micaelli & Storkey 2019 (ZSKT) do, instead of on a new one each.
        keep: images that are drawn once the student is done and kept in the transfer set, to be looked at and judged
            on.
    """

    is_live: ClassVar[bool] = True

    def __init__(
        self,
        feed: Feed,
        *,
        generator_steps: Positive = 1,
        student_steps: Positive = 5,
        same_batch: bool = False,
        keep: Count = 200,
    ) -> None:
        if feed.generator is None:
            raise RecipeError("distill.source is live, but this synthesizer has no generator to train; use generator")
        self._generator = feed.generator(max(1, feed.steps * generator_steps // student_steps))
        self._feed = feed
        self._generator_steps, self._student_steps = generator_steps, student_steps
        self._same_batch = same_batch
        self._batch: SyntheticBatch | None = None
        self._keep = keep
        self._step = 0

    def __iter__(self) -> Iterator[StudentBatch]:
        """Batches without end."""
        ranks, total = self._feed.ranks, self._feed.batch_size
        count = ranks.count_of(total)
        while True:
            self._generator.reseed(derive_seed(self._feed.seed, "live", self._step, ranks.rank))
            if self._step % self._student_steps == 0:
                for _ in range(self._generator_steps):
                    with torch.enable_grad():  # who asks for a batch may want no gradients of its own
                        self._generator.update()
            if self._batch is None or not self._same_batch or self._step % self._student_steps == 0:
                self._batch = self._generator.sample(count)
            batch = self._batch
            self._step += 1
            yield StudentBatch(
                images=batch.images,
                labels=batch.labels,
                teacher_logits=batch.teacher_logits,
                share=count * ranks.size / total,
                snapshot_images=self._step * total,
            )

    def state_dict(self) -> dict[str, Any]:
        """The generator, its optimiser and random numbers, and the step."""
        batch = self._batch if self._same_batch else None
        return {
            "step": self._step,
            "generator": self._generator.state_dict(),
            "batch": None if batch is None else batch.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from ``state``."""
        self._step = state["step"]
        self._generator.load_state_dict(state["generator"])
        batch = state.get("batch")  # which earlier versions did not keep
        self._batch = None if batch is None else SyntheticBatch(**batch)

    def start_over(self) -> None:
        """Do nothing, since every batch is new."""

    def finish(self) -> None:
        """Draw the images to keep and commit them to the transfer set."""
        if not self._keep or self._feed.ranks.rank:
            return
        request = Request(classes=(0,), images_per_class=self._keep, seed=self._feed.seed, class_seeds=(0,))
        unit = WorkUnit(id=f"live-{self._step:09d}", request=request)
        if unit.id in self._feed.transfer_set.committed():
            return
        self._feed.transfer_set.create()  # nobody else has, where the student is trained by itself
        sink = self._feed.transfer_set.open(unit)
        sink.write(self._generator.sample(self._keep))
        sink.commit(seconds=0.0)
