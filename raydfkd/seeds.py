"""Seeds that follow from names, and random number generators from seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else (no device, no worker, no time)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def rng_from(seed: int) -> torch.Generator:
    """A CPU generator of random numbers, so that a seed means the same on every device."""
    import torch  # here, so that a plan can be made without it

    return torch.Generator().manual_seed(seed)


def rng_at(state: Tensor) -> torch.Generator:
    """A CPU generator that goes on from ``state``."""
    import torch

    rng = torch.Generator()
    rng.set_state(state)
    return rng


def seed_globally(seed: int, device: torch.device | None = None) -> None:
    """Seed torch's global random numbers: those of the CPU, and those of ``device`` where it is a GPU.

    ``torch.manual_seed`` also tells kinds of devices that are not there, and notes the stack for each of them, which
    takes a millisecond of a slow core at every step.
    """
    import torch

    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Torch's global random numbers follow from ``seed`` inside, on ``device`` too, and outside are what they were."""
    import torch

    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        seed_globally(seed, device)
        yield
