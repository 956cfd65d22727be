"""The rows that are shuffled together, and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from raydfkd.data.commits import Part
from raydfkd.data.shards import StoredRows


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows ``low`` to ``high`` of a part."""

    part: Part
    low: int
    high: int


class ShuffleBuffer:
    """The rows of some pieces, one piece after another; images stay in the parts that they were read in.

    Logits are copied together, and the parts then hold those copies: of many classes they are most of the memory.

    Args:
        pieces: at least one; those of parts that cannot be read are left out.
        fetch: reads a part whole; None where it cannot be read.
        held: parts by path that need not be fetched again.
    """

    def __init__(
        self, pieces: Sequence[Piece], fetch: Callable[[Part], StoredRows | None], *, held: Mapping[str, StoredRows]
    ) -> None:
        self.parts: dict[str, StoredRows] = {}
        labels, self._images = [torch.empty(0, dtype=torch.int64)], []
        logits, begin = torch.empty(0), 0
        for piece in pieces:
            path = piece.part.path
            rows = held[path] if path in held else fetch(piece.part)
            if rows is None:
                continue
            if not self.parts:
                size = sum(each.high - each.low for each in pieces)
                logits = torch.empty(size, *rows.teacher_logits.shape[1:], dtype=rows.teacher_logits.dtype)
            here = slice(piece.low, piece.high)
            copy = logits[begin : begin + piece.high - piece.low]
            copy[:] = rows.teacher_logits[here]
            begin += len(copy)
            # a copy of its own where not all rows are in the buffer, else a part that is held on would hold a buffer
            kept = copy if len(copy) == len(rows) else rows.teacher_logits.clone()
            self.parts[path] = replace(rows, teacher_logits=kept)
            self._images.append(rows.images[here].numpy())
            labels.append(rows.labels[here])
        self._labels, self._logits = torch.cat(labels), logits[:begin]
        assert len({images.shape[1:] for images in self._images}) < 2, "images of a set have one shape"
        self._ends = torch.tensor(list(accumulate(map(len, self._images))))
        self._begins = [0, *self._ends.tolist()[:-1]]

    def __len__(self) -> int:
        """Rows that can be taken."""
        return len(self._labels)

    @property
    def teacher_logits(self) -> Tensor:
        """Those of all rows, [N, K], float16."""
        return self._logits

    def take(self, numbers: Tensor, *, pin_memory: bool = False) -> StoredRows:
        """Copy the rows with these ``numbers``, which count the buffer's rows piece by piece."""
        numbers = numbers.sort().values
        images = torch.empty(len(numbers), *self._images[0].shape[1:], dtype=torch.uint8, pin_memory=pin_memory)
        ends = torch.searchsorted(numbers, self._ends).tolist()
        # numpy, because the call costs half of torch's and there is one for each part; "raise" would copy twice
        picked, out, begin = numbers.numpy(), images.numpy(), 0
        for piece, first, end in zip(self._images, self._begins, ends, strict=True):
            if begin < end:
                np.take(piece, picked[begin:end] - first, axis=0, out=out[begin:end], mode="clip")
            begin = end
        return StoredRows(
            images=images,
            labels=self._labels.index_select(0, numbers),
            teacher_logits=self._logits.index_select(0, numbers),
        )
