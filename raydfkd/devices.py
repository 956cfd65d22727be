"""Devices: which one a process computes on and in what arithmetic, CPU threads and memory, and errors of it."""

from __future__ import annotations

import ctypes
import logging
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from raydfkd.errors import RecipeError

logger = logging.getLogger(__name__)

_CPUINFO = Path("/proc/cpuinfo")
_FOR_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}
"""Names of such instructions there, of x86 and ARM."""


def pick_device(wanted: str, *, where: str = "runtime.device") -> torch.device:
    """The device of this process: the one that is ``wanted``, or CUDA where there is some for ``auto``.

    Raises:
        RecipeError: it is not there; names the key ``where``.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"{where} is 'cuda', but this machine has no CUDA device; use auto or cpu")
    return torch.device(wanted)


def worker_device(wanted: str, gpus: float) -> torch.device:
    """The device of a worker for which so many ``gpus`` are reserved: without one ``auto`` is the CPU.

    Ray does not hide the GPUs of its machine from a worker that reserves none, but they are there for others.
    """
    return pick_device("cpu" if wanted == "auto" and not gpus else wanted)


def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    """What a recipe's ``precision`` is computed in on ``device``: float32 where bfloat16 would only be emulated.

    A processor without instructions for it takes five to twelve times as long in it as in float32.
    """
    if precision == "bfloat16" and not has_bfloat16(device.type):
        _say_no_bfloat16(device.type)
        return torch.float32
    found: torch.dtype = getattr(torch, precision)
    return found


@cache
def has_bfloat16(kind: str) -> bool:
    """Whether devices of a ``kind``, "cpu" or "cuda", have instructions for bfloat16."""
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return _CPUINFO.exists() and not _FOR_BFLOAT16.isdisjoint(_CPUINFO.read_text().split())


@cache
def _say_no_bfloat16(kind: str) -> None:
    logger.info("%s has no bfloat16; computing in float32", kind)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute with ``count`` CPU threads: a different split of a sum is a different last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def keep_freed_memory() -> None:
    """Tell glibc to reuse large blocks instead of returning them to the system after every operation.

    A training step on CPU allocates the same few megabytes over and over; without this each of them is mapped and
    cleared by the kernel again, which costs more than small convolutions do. Elsewhere than on glibc: no effect.
    """
    if not sys.platform.startswith("linux"):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, (1 << 31) - 1)


_ALLOCATORS = ("DefaultCPUAllocator", "not enough memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that an allocation failed, on any device; less work at once may then succeed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(allocator in str(error) for allocator in _ALLOCATORS)


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{platform.machine()} CPU"
