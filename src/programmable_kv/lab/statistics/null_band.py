"""A band of what no change looks like: the same cell measured under another dtype or attention kernel.

A similarity of 0.98 says nothing by itself. If a change of the kernel alone gives 0.999 at worst, then 0.98 is a difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NullBand:
    """The range of a measure where nothing but the arithmetic differs."""

    low: float
    high: float
    n: int
    variants: tuple[str, ...]
    """what differed: a dtype, an attention kernel"""

    def holds(self, value: float) -> bool:
        """Whether a value cannot be told from no change."""
        return self.low <= value <= self.high

    def position(self, value: float) -> str:
        """`inside`, `below` or `above` the band."""
        return "inside" if self.holds(value) else "below" if value < self.low else "above"


def null_band(measured: Mapping[str, Sequence[float]]) -> NullBand:
    """The band of a measure between the reference and each variant: its full range, over all variants and items.

    Raises:
        ValueError: nothing was measured, or something that is no number.
    """
    values = [float(value) for each in measured.values() for value in each]
    if not values or any(value != value for value in values):
        raise ValueError(
            f"a null band needs numbers from at least one variant, got {len(values)} from {sorted(measured)}"
        )
    return NullBand(min(values), max(values), len(values), tuple(measured))
