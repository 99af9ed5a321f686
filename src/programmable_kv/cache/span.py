"""A half-open range of tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """`[start, stop)`, in slots of a buffer or tokens of a text."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"a span must have 0 <= start <= stop, got [{self.start}, {self.stop})")

    def __len__(self) -> int:
        return self.stop - self.start

    def shifted(self, by: int) -> Span:
        return Span(self.start + by, self.stop + by)

    @property
    def range(self) -> range:
        return range(self.start, self.stop)
