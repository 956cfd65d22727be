"""What it looks like when a device has no memory left."""

from __future__ import annotations

import torch

_ALLOCATORS = ("DefaultCPUAllocator", "not enough memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that an allocation failed, on any device; less work at once may then succeed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(allocator in str(error) for allocator in _ALLOCATORS)
