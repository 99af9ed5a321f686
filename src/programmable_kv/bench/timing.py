"""Timing for the benches: medians in milliseconds, taken after the accelerator has finished its work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def synchronise() -> None:
    """Wait until the accelerator, if there is one, has finished its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def elapsed_ms(operation: Callable[[], Any]) -> float:
    """Milliseconds of one operation, from an idle accelerator until the accelerator is idle again."""
    synchronise()
    began = time.perf_counter()
    operation()
    synchronise()
    return 1e3 * (time.perf_counter() - began)


def median_ms(repeats: int, operation: Callable[[], Any], undo: Callable[[], None] | None = None) -> float:
    """Median milliseconds of an operation over `repeats`; `undo` runs after each and is not timed."""
    times = []
    for _ in range(repeats):
        times.append(elapsed_ms(operation))
        if undo is not None:
            undo()
    return statistics.median(times)
