"""Objects that are created once, on an object store that can only overwrite."""

from __future__ import annotations

from uuid import uuid4

from raydfkd.data.folders import ObjectFolder


class EarliestFolder(ObjectFolder):
    """What is created is a claim, ``<path>~/<random>``; the earliest by the store's clock is the object.

    Of claims with the same time the smallest name counts. So all who see the same claims see the same object. What no
    plain reads and writes can give (Herlihy 1991) is that it never changes: a claim that was written within the same
    tick of the clock, or appears in a listing late, may still come before one that was read already. A reader then has
    an attempt that is whole, but not the one that counts in the end. Later claims never count.

    An object of this kind takes two requests more to read than others.
    """

    def put_new(self, path: str, data: bytes) -> bool:
        """See Store; of writers at the same moment each may be the first for a while."""
        if self.exists(path):
            return False
        claim = f"{_folder(path)}/{uuid4().hex}"
        self.put(claim, data)
        return self._claims(path)[:1] == [claim]

    def get(self, path: str) -> bytes:
        """See Store."""
        try:
            return super().get(path)
        except FileNotFoundError:
            claim = self._earliest(path)
            if claim is None:
                raise
            return super().get(claim)

    def exists(self, path: str) -> bool:
        """See Store."""
        return super().exists(path) or self._earliest(path) is not None

    def names(self, prefix: str) -> list[str]:
        """Names of the objects directly under a folder."""
        claimed = [name.removesuffix("~") for name in self.folders(prefix) if name.endswith("~")]
        return [*super().names(prefix), *claimed]

    def delete(self, path: str) -> None:
        """See Store."""
        claims = self._claims(path)
        for claim in claims:
            super().delete(claim)
        if not claims:
            super().delete(path)

    def _earliest(self, path: str) -> str | None:
        return next(iter(self._claims(path)), None)

    def _claims(self, path: str) -> list[str]:
        folder = _folder(path)
        try:
            entries = self.entries(folder)
        except FileNotFoundError:
            return []
        ordered = sorted(entries, key=lambda entry: (entry.modified or 0.0, entry.path))
        return [f"{folder}/{entry.path}" for entry in ordered]


def _folder(path: str) -> str:
    return f"{path}~"
