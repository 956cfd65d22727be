"""A transfer set as pictures, one after another: what is read, and how one becomes a file."""

from __future__ import annotations

import contextlib
import io
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from raydfkd.config.recipe import Recipe
from raydfkd.data.commits import Commit, Snapshot
from raydfkd.data.shards import StoredRows
from raydfkd.data.transfer_set import TransferSet
from raydfkd.errors import RecipeError, RunError
from raydfkd.export.student import names_of
from raydfkd.images.pictures import CHANNELS
from raydfkd.job import asks_student, transfer_set_of
from raydfkd.store.errors import DamagedError, StoreError


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An image of a transfer set as a file, with all that the set knows of it."""

    png: bytes
    label: int
    class_name: str
    teacher_logits: tuple[float, ...]
    """K numbers, of exactly these pixels unless the set stores JPEG or lossy WebP."""
    unit: str
    seed: int
    """Of the unit."""
    index: int
    """Number of the image in its unit."""

    @property
    def name(self) -> str:
        """Names the picture in its set; without a dot, which would begin the ending of a file name."""
        return f"{self.unit.replace('.', '_')}-{self.seed}-{self.index:05d}"


@dataclass(frozen=True, kw_only=True)
class PictureSet:
    """What is committed of a set at one moment, to be read as pictures."""

    transfer_set: TransferSet
    snapshot: Snapshot
    class_names: tuple[str, ...]
    """Names of the K classes, each another."""
    shape: tuple[int, int, int]
    """Channels, height and width of an image."""
    top_k: int | None = None
    """Logits of an image that are the teacher's, where the set keeps only the largest."""

    def __iter__(self) -> Iterator[Picture]:
        """Every picture, unit by unit; no more than one part of the set is held at a time.

        Raises:
            RunError: a unit is damaged; it is taken out of the set.
        """
        for commit in self.snapshot.commits:
            index = 0
            for number in range(len(commit.parts)):
                rows = _read(self.transfer_set, commit, number)
                yield from self._pictures(rows, commit, index)
                index += len(rows)

    def _pictures(self, rows: StoredRows, commit: Commit, first: int) -> Iterator[Picture]:
        for row, (image, label, logits) in enumerate(
            zip(rows.images, rows.labels.tolist(), rows.teacher_logits.tolist(), strict=True)
        ):
            yield Picture(
                png=png_of(image),
                label=label,
                class_name=self.class_names[label],
                teacher_logits=tuple(logits),
                unit=commit.unit,
                seed=commit.seed,
                index=first + row,
            )


def png_of(image: Tensor) -> bytes:
    """A uint8 image [C, H, W] of 1, 3 or 4 channels as a PNG file."""
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    picture = Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels)
    picture.save(file, "png", compress_type=zlib.Z_RLE)  # images close to noise have no repeats to search for
    return file.getvalue()


def pictures_of(recipe: Recipe) -> PictureSet:
    """The units of the recipe's plan that are there.

    Raises:
        RecipeError: there is none, the set is of another recipe, or its images are no pictures.
    """
    uri = recipe.transfer_set.uri
    found = TransferSet.at(uri, recipe.transfer_set.storage_options)
    if "weights" in found.made_of:  # of the teacher, which need not be here
        own = recipe.made_of(str(found.made_of["weights"]), is_against_student=asks_student(recipe))
        transfer_set_of(recipe, own).check()
    units = frozenset(unit.id for unit in recipe.plan())
    return _opened(found, found.snapshot(units), names_of(recipe))


def pictures_at(uri: str) -> PictureSet:
    """Everything that is committed to the set at ``uri``; classes are called by their numbers.

    Raises:
        RecipeError: there is no set, or no image in it, or its images are no pictures.
    """
    found = TransferSet.at(uri)
    return _opened(found, found.snapshot(), ())


def _opened(found: TransferSet, snapshot: Snapshot, class_names: tuple[str, ...]) -> PictureSet:
    if not snapshot.commits:
        raise RecipeError(
            f"transfer_set.uri is {found.store.uri}: there is no image yet; `raydfkd synthesize` makes them"
        )
    rows = _read(found, snapshot.commits[0], 0)
    channels, height, width = rows.images.shape[1:]
    if channels not in CHANNELS:
        raise RecipeError(
            f"transfer_set.uri is {found.store.uri}: its images have {channels} channels, and picture files have 1, 3 "
            "or 4; read the set itself, which is Parquet (docs/transfer-set.md)"
        )
    names = class_names or tuple(str(label) for label in range(rows.teacher_logits.shape[1]))
    shape = (channels, height, width)
    return PictureSet(transfer_set=found, snapshot=snapshot, class_names=distinct(names), shape=shape, top_k=rows.top_k)


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Names of classes, with the number behind those that several classes have, as two of ImageNet's are cranes."""
    counts = Counter(names)
    return tuple(name if counts[name] == 1 else f"{name} ({label})" for label, name in enumerate(names))


def _read(transfer_set: TransferSet, commit: Commit, number: int) -> StoredRows:
    try:
        return transfer_set.read(commit.parts[number])
    except DamagedError as damage:
        with contextlib.suppress(StoreError):  # a reader may have no access to write
            transfer_set.mark_damaged(commit, damage)
        raise RunError(
            f"{damage}; the same command leaves unit {commit.unit} out, and `raydfkd run` makes it again"
        ) from None
