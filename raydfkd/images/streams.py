"""Pictures that are decoded while somebody goes through them: a few ahead, on threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from raydfkd.images.pictures import BrokenPictureError
from raydfkd.images.real_data import Batch, OnBroken, ignore

THREADS = 4
AHEAD = 32
"""Pictures that are decoded, or being decoded, beside the batch that is put together."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that is still to be read."""

    name: str
    """For messages."""
    read: Callable[[], tuple[Tensor, int]]
    """Returns it as uint8 [C, H, W] of the teacher's size, and its label; called on a thread."""


class PictureStream:
    """A split whose pictures are read in order, on threads; no more of them are in memory than a batch and some.

    Args:
        pictures: begins anew at the first one each time it is called.
    """

    def __init__(self, pictures: Callable[[], Iterable[Picture]]) -> None:
        self._pictures = pictures

    def thinned(self, most: int) -> PictureStream:
        """The same split with ``most`` pictures, evenly spaced over it, or all; the others are not decoded."""

        def pictures() -> Iterator[Picture]:
            total = sum(1 for _ in self._pictures())
            for number, picture in enumerate(self._pictures()):
                if number * most % total < most:
                    yield picture

        return PictureStream(pictures)

    def batches(self, size: int, on_broken: OnBroken = ignore) -> Iterator[Batch]:
        """Yield ``size`` pictures at a time, fewer at the end; broken ones are left out, after ``on_broken`` is told.

        Raises:
            RecipeError: what reading a picture complains of.
        """
        images: list[Tensor] = []
        labels: list[int] = []
        for name, read in _ahead(self._pictures()):
            try:
                image, label = read.result()
            except BrokenPictureError:
                on_broken(name)
                continue
            images.append(image)
            labels.append(label)
            if len(labels) == size:
                yield _taken(images, labels)
        if labels:
            yield _taken(images, labels)


def _taken(images: list[Tensor], labels: list[int]) -> Batch:
    """All of them as one batch; nothing else keeps them from then on."""
    batch = torch.stack(images), torch.tensor(labels)
    images.clear()
    labels.clear()
    return batch


def _ahead(pictures: Iterable[Picture]) -> Iterator[tuple[str, Future[tuple[Tensor, int]]]]:
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="picture")
    waiting: deque[tuple[str, Future[tuple[Tensor, int]]]] = deque()
    try:
        for picture in pictures:
            waiting.append((picture.name, pool.submit(picture.read)))
            if len(waiting) >= AHEAD:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(cancel_futures=True)
