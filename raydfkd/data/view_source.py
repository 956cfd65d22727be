"""Batches of augmented views that the teacher was asked about once, so that training needs no teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import xxhash
from torch import Tensor
from typing_extensions import override

from raydfkd.config.schema import LogitsSpec, Positive
from raydfkd.data.commits import Part, Snapshot
from raydfkd.data.logits import completed, largest
from raydfkd.data.set_source import Split, TransferSetSource
from raydfkd.data.shards import StoredRows
from raydfkd.data.shuffle_buffer import ShuffleBuffer
from raydfkd.data.sources import SOURCES, Feed, StudentBatch
from raydfkd.errors import RecipeError
from raydfkd.images.views import refuse_unnameable
from raydfkd.seeds import derive_seed

HELD_BYTES = 2**32
"""Maximum of bytes of answers that a training worker holds."""
ASKED_AT_ONCE = 64
"""Images of a part that the teacher is asked about together; another number is another last bit."""


VIEWS, TOP_K = 8, 10
Keep = Literal["top_k", "all"]


@SOURCES.register("views")
class ViewSource(TransferSetSource):
    """Waits for the whole set, asks the teacher once about some augmented views of each image, then replays those.

    A view is named by a seed that follows from the image's pixels and the view's number, so that only the teacher's
    answers are held and the same crops are made again. An image shows its views in turn, one an epoch, and training
    asks no teacher. Each training worker asks about the parts that it reads, when it first reads them, and so does one
    that resumes. Sources: Shen & Xing 2022 (FKD), Yin et al. 2023 (SRe2L), whose released code stores crops, flips and
    mixes of whole batches, so that training has to have the batch size and the order of the relabelling; ours need not,
    and do not mix images.

    Args:
        views: views of each image.
        keep: all of an answer in float16, or the likeliest classes with the rest of the probability spread evenly.
        top_k: classes that are kept with top_k.
        window_rows: rows that are shuffled together, fewer where their pixels or logits would be more than 1 GiB.
    """

    def __init__(
        self,
        feed: Feed,
        *,
        views: Positive = VIEWS,
        keep: Keep = "top_k",
        top_k: Positive = TOP_K,
        window_rows: Positive = 65536,
    ) -> None:
        refuse_unnameable(feed.augment, where="distill.augment", who="distill.source views")
        if keep == "top_k" and top_k >= feed.num_classes:
            raise RecipeError(
                f"distill.source.top_k is {top_k}, but there are {feed.num_classes} classes; use fewer, or keep: all"
            )
        size = bytes_held(feed.planned_images, feed.num_classes, views=views, keep=keep, top_k=top_k)
        if size > HELD_BYTES:
            raise RecipeError(
                f"distill.source.views is {views}, but the answers to those of {feed.planned_images:,} images are "
                f"{size / 2**30:.0f} GiB and {HELD_BYTES / 2**30:.0f} are held; use fewer views, or keep: top_k"
            )
        super().__init__(feed, wanted_images=lambda _: feed.planned_images, refresh_steps=None, window_rows=window_rows)
        self._ask = feed.ask
        self._num_views, self._num_classes = views, feed.num_classes
        self._top_k = top_k if keep == "top_k" else None
        self._asked: set[str] = set()
        # Where the answers to an image's views are, by what its pixels hash to: row of tensors that many images share.
        self._answers: dict[int, tuple[tuple[Tensor, ...], int]] = {}

    @override
    def _read(self, snapshot: Snapshot, part: Part) -> StoredRows | None:
        rows = super()._read(snapshot, part)
        if rows is not None and part.path not in self._asked:
            for images in rows.images.split(ASKED_AT_ONCE):
                self._ask_about(images)
            self._asked.add(part.path)
        return rows

    def _ask_about(self, images: Tensor) -> None:
        assert self._ask is not None, "whoever trains can be asked"
        keys = _keys_of(images)
        logits = [self._ask(images, self._seeds(keys, [view] * len(keys))) for view in range(self._num_views)]
        kept = compressed(torch.stack(logits, 1), self._top_k)
        self._answers |= {key: (kept, row) for row, key in enumerate(keys)}

    def _seeds(self, keys: list[int], views: list[int]) -> Tensor:
        return torch.tensor([derive_seed(self._seed, key, view) for key, view in zip(keys, views, strict=True)])

    @override
    def _batch(
        self, window: ShuffleBuffer, order: Tensor, split: Split, step: int, snapshot_images: int
    ) -> StudentBatch:
        batch = super()._batch(window, order, split, step, snapshot_images)
        keys = _keys_of(batch.images)
        views = [(self._epoch + key) % self._num_views for key in keys]
        places = zip((self._answers[key] for key in keys), views, strict=True)
        found = [[column[row, view] for column in kept] for (kept, row), view in places]
        answers = tuple(map(torch.stack, zip(*found, strict=True)))
        return replace(batch, teacher_logits=expanded(answers, self._num_classes), view_seeds=self._seeds(keys, views))


def bytes_held(images: int, classes: int, *, views: int = VIEWS, keep: Keep = "top_k", top_k: int = TOP_K) -> int:
    """Bytes of the answers to so many views of each of ``images``; a training worker holds those of what it reads."""
    form = LogitsSpec(kind="float16" if keep == "all" else "top_k", k=top_k)
    return images * views * form.bytes_of(classes)


def _keys_of(images: Tensor) -> list[int]:
    """A hash of each image's pixels."""
    return [xxhash.xxh3_64_intdigest(image.tobytes()) for image in images.contiguous().numpy()]


def compressed(logits: Tensor, top_k: int | None) -> tuple[Tensor, ...]:
    """Logits [..., K] in float16; with ``top_k`` the largest of the log-probabilities, as ``largest`` returns them."""
    if top_k is None:
        return (logits.half(),)
    return largest(logits.float().log_softmax(-1), top_k)


def expanded(kept: tuple[Tensor, ...], num_classes: int) -> Tensor:
    """Logits [N, K], float16, of what ``compressed`` made of them."""
    if len(kept) == 1:
        return kept[0]
    largest_of_all, classes = kept
    return completed(largest_of_all, classes, num_classes)
