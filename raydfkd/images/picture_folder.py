"""Folders of real pictures without labels, which a synthesis starts from or takes statistics of, or which judge."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from raydfkd.config.recipe import Recipe
from raydfkd.config.schema import ImageSpace
from raydfkd.errors import RecipeError
from raydfkd.images.pictures import CHANNELS, SUFFIXES, BrokenPictureError, pictures_in, read_picture
from raydfkd.images.streams import Picture, PictureStream

FEWEST = 2
"""Pictures of which there are moments."""
MOST_BYTES = 256 * 2**20
"""Pixels that every worker holds; a few pictures are meant, not a training set."""
NAMED = 3
"""Broken pictures that a note names."""
_USES = {
    "synthesis.start.images": "synthesis starts from",
    "synthesis.statistics": "moments are compared with those of",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureFolder:
    """The pictures of a folder and of those below it."""

    folder: str
    images: Tensor
    """uint8 [P, C, H, W], in the order of their names; nobody changes it."""
    folders: tuple[str, ...]
    """The first folder on the way to each picture; empty for one that lies in none."""
    sha256: str
    """Of the names within the folder and contents of all files, whether they can be decoded or not."""
    broken: tuple[str, ...]
    """Files that cannot be decoded, and why."""

    def by_class(self, names: Sequence[str], *, where: str) -> list[Tensor]:
        """The pictures of each class [P, C, H, W], from the folder that has its name or number.

        Raises:
            RecipeError: a class has fewer than two; ``where`` is the recipe key to blame.
        """
        found = []
        for label, name in enumerate(names):
            rows = [row for row, folder in enumerate(self.folders) if folder in (name, str(label))]
            if len(rows) < FEWEST:
                raise RecipeError(
                    f"{where} is {self.folder!r}, which has {len(rows)} pictures in a folder called {name!r} or "
                    f"{label}; give at least {FEWEST} of each class, better about 100, or drop statistics_per_class"
                )
            found.append(self.images[rows])
        return found

    def notes(self, key: str) -> list[str]:
        """What the user should know of the pictures that stand at ``key`` in a recipe, a line each."""
        if not self.broken:
            return []
        more = f" and {len(self.broken) - NAMED} more" if len(self.broken) > NAMED else ""
        return [
            f"{key}: skipped {len(self.broken)} of {len(self.images) + len(self.broken)} pictures: "
            f"{', '.join(self.broken[:NAMED])}{more}"
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnlabelledFolder:
    """Pictures of a folder, found but not read."""

    path: str
    stream: PictureStream
    """Decodes them while one goes through it; all have the label 0."""


def pictures_of(recipe: Recipe) -> dict[str, PictureFolder]:
    """The real pictures that the recipe's synthesis reads, by their keys; decoded again only where a file changed.

    Raises:
        RecipeError: a folder is missing or too large, has fewer than two pictures that can be decoded, or the teacher's
            images have a number of channels that pictures do not have.
    """
    space = recipe.teacher.image_space
    return {key: read_folder(folder, space, where=key) for key, folder in recipe.picture_folders.items()}


def not_data_free(pictures: Mapping[str, PictureFolder]) -> str | None:
    """Says what real pictures a synthesis reads and what for, to stand behind "not data-free"; None where none."""
    said = [f"{_USES[key]} {len(found.images):,} real pictures in {found.folder}" for key, found in pictures.items()]
    return " and ".join(said) or None


def read_folder(folder: str, space: ImageSpace, *, where: str) -> PictureFolder:
    """Read the pictures of ``folder``, in the channels and size of ``space``; ``where`` is the recipe key to blame.

    Raises:
        RecipeError: as ``pictures_of``.
    """
    path, files = Path(folder), _files_of(folder, space, where=where)
    most = max(FEWEST, MOST_BYTES // torch.Size(space.shape).numel())
    if len(files) > most:
        raise RecipeError(
            f"{where} is {folder!r}, which has {len(files):,} pictures; each worker holds at most {most:,} of "
            f"{space.size_text} pixels: give a folder with some of them"
        )
    states = [file.stat() for file in files]
    stamps = tuple((file, state.st_size, state.st_mtime_ns) for file, state in zip(files, states, strict=True))
    found = _read(path, stamps, space)
    if len(found.images) < FEWEST:
        reason = f": {found.broken[0]}" if found.broken else ""
        raise RecipeError(
            f"{where} is {folder!r}: {len(found.images)} of {len(files)} pictures can be decoded{reason}; "
            f"give at least {FEWEST}, better about 100"
        )
    return found


def stream_folder(folder: str, space: ImageSpace, *, where: str) -> UnlabelledFolder:
    """Find the pictures of ``folder`` and below, however many; ``where`` is the key or option to blame.

    Raises:
        RecipeError: the folder is missing or has no picture, or pictures have no such number of channels.
    """
    pictures = [
        Picture(file.relative_to(folder).as_posix(), partial(_unlabelled, file, space))
        for file in _files_of(folder, space, where=where)
    ]
    return UnlabelledFolder(path=folder, stream=PictureStream(lambda: pictures))


def _unlabelled(file: Path, space: ImageSpace) -> tuple[Tensor, int]:
    return read_picture(file, space), 0


def _files_of(folder: str, space: ImageSpace, *, where: str) -> list[Path]:
    if space.channels not in CHANNELS:
        raise RecipeError(
            f"{where} names pictures, which have 1, 3 or 4 channels, but teacher.image_space.channels is "
            f"{space.channels}; drop {where}"
        )
    path = Path(folder)
    if not path.is_dir():
        raise RecipeError(f"{where} is {folder!r}: no such folder; give one of pictures that every worker sees")
    files = pictures_in(path)
    if not files:
        raise RecipeError(f"{where} is {folder!r}: no picture in it or below; known are {', '.join(sorted(SUFFIXES))}")
    return files


@lru_cache(maxsize=4)
def _read(folder: Path, stamps: Sequence[tuple[Path, int, int]], space: ImageSpace) -> PictureFolder:
    """Files with size and time of change, so that what a process has read is read again where one is another."""
    digest = hashlib.sha256()
    images: list[Tensor] = []
    folders: list[str] = []
    broken: list[str] = []
    for file, _, _ in stamps:
        name = file.relative_to(folder).as_posix()
        try:
            content = file.read_bytes()
        except OSError as error:
            raise RecipeError(f"{file} cannot be read: {error.strerror}; let every worker read it") from None
        for part in (name.encode(), content):
            digest.update(len(part).to_bytes(8, "big") + part)
        try:
            images.append(read_picture(file, space))
            folders.append(name.partition("/")[0] if "/" in name else "")
        except BrokenPictureError as error:
            broken.append(str(error).removeprefix(f"{folder}/"))
    return PictureFolder(
        folder=str(folder),
        images=torch.stack(images) if images else torch.empty(0, *space.shape, dtype=torch.uint8),
        folders=tuple(folders),
        sha256=digest.hexdigest(),
        broken=tuple(broken),
    )
