"""How the benches take a time: the median of a few, in milliseconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


def median_ms(repeats: int, operation: Callable[[], Any], undo: Callable[[], None] | None = None) -> float:
    """Median milliseconds of an operation over `repeats`; what `undo` takes after each is not counted."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        operation()
        times.append(1e3 * (time.perf_counter() - began))
        if undo is not None:
            undo()
    return statistics.median(times)
