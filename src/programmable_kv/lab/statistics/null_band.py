"""Null bands: the range of a measure when only the dtype or the attention kernel changes.

A similarity of 0.98 says nothing by itself. If a change of the kernel alone gives 0.999 at worst, 0.98 is a difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NullBand:
    """The range of a measure when only the arithmetic differs."""

    low: float
    high: float
    n: int
    variants: tuple[str, ...]
    """what differed: a dtype, an attention kernel"""

    def holds(self, value: float) -> bool:
        """Return whether the band contains a value, which then cannot be distinguished from no change."""
        return self.low <= value <= self.high

    def position(self, value: float) -> str:
        """Return where a value lies: `inside`, `below` or `above` the band."""
        return "inside" if self.holds(value) else "below" if value < self.low else "above"


def null_band(measured: Mapping[str, Sequence[float]]) -> NullBand:
    """Return the full range, over all variants and items, of a measure between the reference and each variant.

    Raises:
        ValueError: there are no values, or a value is NaN.
    """
    values = [float(value) for each in measured.values() for value in each]
    if not values or any(value != value for value in values):
        raise ValueError(
            f"a null band needs numbers from at least one variant, got {len(values)} from {sorted(measured)}"
        )
    return NullBand(min(values), max(values), len(values), tuple(measured))
