"""Measures the gateway's own time: the total without the waits for clients, for a place, and for the upstream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class Stopwatch:
    """Starts when it is created."""

    def __init__(self) -> None:
        self._began = perf_counter()
        self._waits: dict[str, float] = {}

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Count the block's time as waiting."""
        began = perf_counter()
        try:
            yield
        finally:
            self._waits[what] = self._waits.get(what, 0.0) + perf_counter() - began

    def waited(self, what: str) -> float:
        """Seconds spent waiting for one thing."""
        return self._waits.get(what, 0.0)

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return perf_counter() - self._began

    @property
    def own(self) -> float:
        """Seconds not spent waiting."""
        return self.total - sum(self._waits.values())
