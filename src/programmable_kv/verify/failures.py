"""Errors that say nothing about the model: a check that ends with one has no verdict."""

from __future__ import annotations

import torch

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch raises its own error for it, or a RuntimeError with a message."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)


def may_pass(error: BaseException) -> bool:
    """Whether a retry may succeed. A RuntimeError may come from a device or an allocator as well as from the model."""
    return isinstance(error, RuntimeError | MemoryError) and not isinstance(error, NotImplementedError | RecursionError)
