"""The gateway's own time: all of it, less what it waited for clients, for a place, and for the upstream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class Stopwatch:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self._began = perf_counter()
        self._waits: dict[str, float] = {}

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """The block only waits."""
        began = perf_counter()
        try:
            yield
        finally:
            self._waits[what] = self._waits.get(what, 0.0) + perf_counter() - began

    def waited(self, what: str) -> float:
        """Seconds that were spent waiting for one thing."""
        return self._waits.get(what, 0.0)

    @property
    def total(self) -> float:
        """Seconds since the beginning."""
        return perf_counter() - self._began

    @property
    def own(self) -> float:
        """Seconds that were not spent waiting."""
        return self.total - sum(self._waits.values())
