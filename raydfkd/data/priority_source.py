"""Batches from a small transfer set in memory: rows are drawn the oftener the less the student knows of them."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from raydfkd.config.schema import Fraction, NotNegative, Positive
from raydfkd.data.commits import Part, Snapshot
from raydfkd.data.set_source import TransferSetSource, keeping_pace
from raydfkd.data.shuffle_buffer import Piece, ShuffleBuffer
from raydfkd.data.sources import SOURCES, Feed, StudentBatch
from raydfkd.errors import RecipeError
from raydfkd.seeds import derive_seed

HELD_BYTES = 2**32
"""Maximum of bytes of pixels that a training worker holds: 28,532 images of 3x224x224, a million of 3x32x32."""
REMEMBERED = 0.9
"""Share of the count of earlier draws that is left a step later; so the last ten steps or so count."""
LEAST = 1e-6
"""Least difficulty in nats: a row that the student has learnt comes again some day."""
NOT_DRAWN = -1.0
"""Stands for the difficulty of a row that was not drawn yet."""


@SOURCES.register("priority")
class PrioritySource(TransferSetSource):
    """Draws images the oftener the further the student was from the teacher, and the rarer their class was of late.

    A row's priority is its difficulty times its rarity. Its difficulty is KL(teacher || student), as the student stood
    when the row was last drawn; a row that was not drawn yet has that of the most difficult one. Its rarity is
    1 / (1 + K s), where s is the share of the class that the teacher sees in it, one of K, among the draws of the last
    steps. Rows are drawn with replacement, with probability p proportional to priority ** alpha.

    An image's gradient is weighted by (N p) ** -beta, scaled so that weights are 1 on average: with a beta of 1 the
    gradient is that of a uniform draw in expectation, however rows are drawn.

    Each training worker holds the set, and draws from its own share of it; all of them know of all difficulties, so
    that a training resumes from its checkpoint with the same batches. Sources: the idea of SSD-KD (CVPR 2024), whose
    code was never released and which lets a policy choose what priority decides here; weights of Schaul et al. 2016,
    there scaled by the largest of them instead.

    Args:
        alpha: exponent of the priority; 0 draws uniformly.
        beta: exponent of the weights; 0 for none, 1 for the gradient of a uniform draw.
        wait_for: images that must be committed before the first step.
        complete_by: share of the student's steps that may pass before the set is complete; before that the student
            keeps pace with the synthesis.
        refresh_steps: steps after which the newest snapshot of a growing set is taken.
    """

    def __init__(
        self,
        feed: Feed,
        *,
        alpha: NotNegative = 0.6,
        beta: Fraction = 0.4,
        wait_for: Positive = 1,
        complete_by: Fraction = 0.5,
        refresh_steps: Positive = 200,
    ) -> None:
        size = feed.planned_images * feed.image_bytes
        if size > HELD_BYTES:
            raise RecipeError(
                f"distill.source is priority, which holds the set in memory, but {feed.planned_images:,} images are "
                f"{size / 2**30:.0f} GiB and {HELD_BYTES / 2**30:.0f} are held; use growing, or fewer images"
            )
        super().__init__(
            feed,
            wanted_images=keeping_pace(feed, wait_for=wait_for, complete_by=complete_by),
            refresh_steps=None,
            window_rows=feed.batch_size,
        )
        self._alpha, self._beta = alpha, beta
        self._every = refresh_steps
        self._planned_images = feed.planned_images
        self._gather = feed.ranks.gather
        self._count = feed.ranks.count_of(feed.batch_size)
        self._share = self._count * feed.ranks.size / feed.batch_size
        self._restored: dict[str, Tensor] = {}  # difficulties of a checkpoint's parts
        self._parts: list[Part] = []
        self._difficulty = torch.empty(0, dtype=torch.float64)  # of the rows of those parts, one part after another
        self._recent = torch.empty(0, dtype=torch.float64)  # draws of each class in the last steps
        self._drawn = torch.empty(0, 2, dtype=torch.float64)  # rows of the last batch: their numbers and classes

    @override
    def _batches(self, snapshot: Snapshot) -> Generator[StudentBatch]:
        """Batches without end over a complete set, else until it is time for a newer snapshot."""
        rows, numbers = self._own_rows(snapshot)
        classes = rows.teacher_logits.argmax(1)
        while snapshot.images >= self._planned_images or self._step_in_epoch < self._every:
            yield self._draw(rows, numbers, classes, snapshot)

    def _own_rows(self, snapshot: Snapshot) -> tuple[ShuffleBuffer, Tensor]:
        """This rank's rows, and the number of each among those of all parts."""
        self._know(snapshot)
        begins = dict(zip((part.path for part in self._parts), self._begins(), strict=True))
        pieces = [piece for part in self._parts if (piece := self._own_piece(part)).low < piece.high]
        pieces = pieces or [Piece(part, 0, part.rows) for part in self._parts]  # fewer rows than ranks, or nearly
        rows = ShuffleBuffer(pieces, partial(self._read, snapshot), held=self._held)
        if not len(rows):
            raise self._nothing_left(snapshot)
        self._held = rows.parts
        there = [(begins[piece.part.path], piece) for piece in pieces if piece.part.path in rows.parts]
        return rows, torch.cat([torch.arange(first + piece.low, first + piece.high) for first, piece in there])

    def _own_piece(self, part: Part) -> Piece:
        """This rank's range of a part's rows; ranks begin elsewhere in each, so that what is left over goes round."""
        place = (self._rank + derive_seed(part.path)) % self._world_size
        return Piece(part, part.rows * place // self._world_size, part.rows * (place + 1) // self._world_size)

    def _know(self, snapshot: Snapshot) -> None:
        """Number the rows of ``snapshot``; those that were known stay as difficult as they were."""
        known = self._by_part()
        self._parts = [part for commit in snapshot.commits for part in commit.parts]
        fresh = [torch.full((part.rows,), NOT_DRAWN, dtype=torch.float64) for part in self._parts]
        self._difficulty = torch.cat(
            [known.get(part.path, rows) for part, rows in zip(self._parts, fresh, strict=True)]
        )

    def _by_part(self) -> dict[str, Tensor]:
        """Difficulties of the rows of every part that is known."""
        rows = self._difficulty.split([part.rows for part in self._parts])
        return self._restored | {part.path: some.clone() for part, some in zip(self._parts, rows, strict=True)}

    def _begins(self) -> list[int]:
        """Number of the first row of each part."""
        return list(accumulate((part.rows for part in self._parts), initial=0))[:-1]

    def _draw(self, rows: ShuffleBuffer, numbers: Tensor, classes: Tensor, snapshot: Snapshot) -> StudentBatch:
        odds = self._priorities(self._difficulty[numbers], classes, rows.teacher_logits.shape[1]) ** self._alpha
        odds = odds / odds.sum()
        rng = self._rng("draw", self._step, self._rank)
        chosen = torch.multinomial(odds, self._count, replacement=True, generator=rng).sort().values
        weights = (len(odds) * odds) ** -self._beta
        weights = weights / (odds * weights).sum()
        self._drawn = torch.stack([numbers[chosen], classes[chosen]], 1).double()
        taken = rows.take(chosen, pin_memory=self._pin_memory)
        return StudentBatch(
            images=taken.images,
            labels=taken.labels,
            teacher_logits=taken.teacher_logits,
            share=self._share,
            weights=weights[chosen].float(),
            snapshot_images=snapshot.images,
        )

    def _priorities(self, difficulty: Tensor, classes: Tensor, num_classes: int) -> Tensor:
        if len(self._recent) != num_classes:
            self._recent = torch.zeros(num_classes, dtype=torch.float64)
        known = self._difficulty.max()
        hardest = known if known > 0 else torch.ones_like(known)
        difficulty = torch.where(difficulty < 0, hardest, difficulty)
        shares = self._recent / self._recent.sum().clamp_min(1.0)
        return difficulty.clamp_min(LEAST) / (1 + num_classes * shares[classes])

    def note(self, losses: Tensor) -> None:
        """Take note of how far the student was from the teacher on each image of the last batch, [N]; on all ranks."""
        finite = losses.double().nan_to_num(0.0, posinf=0.0, neginf=0.0)  # the trainer finds out soon enough
        drawn = self._gather(torch.cat([self._drawn, finite[:, None].clamp_min(0.0)], 1))
        numbers, classes = drawn[:, 0].long(), drawn[:, 1].long()
        self._difficulty.scatter_reduce_(0, numbers, drawn[:, 2], "mean", include_self=False)
        self._recent = REMEMBERED * self._recent + classes.bincount(minlength=len(self._recent))

    @override
    def state_dict(self) -> dict[str, Any]:
        """The position, and what is known of the rows."""
        return {**super().state_dict(), "difficulty": self._by_part(), "recent": self._recent.clone()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._restored, self._recent = dict(state["difficulty"]), state["recent"].clone()
        self._parts, self._difficulty = [], self._difficulty[:0]
