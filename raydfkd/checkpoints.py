"""Checkpoints as bytes: states from which work resumes, of tensors and plain data, never code."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch


def checkpoint_bytes(state: Mapping[str, Any]) -> bytes:
    """A state as the bytes of a file."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def read_checkpoint(content: bytes) -> dict[str, Any]:
    """The state in a file; refuses anything but tensors and plain data.

    Raises:
        ValueError: the content is cut off, damaged or something else than a checkpoint.
        Exception: there is too little memory for it.
    """
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader has no error of its own
        if isinstance(error, MemoryError) or "Allocator" in str(error):  # of this machine, not of the content
            raise
        raise ValueError(f"{len(content)} bytes that are no checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise ValueError(f"a {type(state).__name__} in place of a checkpoint")
    return state
