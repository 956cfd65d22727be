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
    """The state in a file; refuses anything but tensors and plain data."""
    state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return state
