"""Corrections for many tests: which findings of a family are significant, and which cells of a map exceed chance.

A map is a table of scores with a row for each item and a column for each cell (a layer and a position, a head, ...).
Cells are compared with the largest cell of maps with permuted labels, which corrects for looking at all cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Return a family's adjusted p-values in order; the ones below q have a false discovery rate of at most q."""
    from scipy.stats import false_discovery_control

    return [float(p) for p in false_discovery_control(p_values, method="bh")] if len(p_values) else []


@dataclass(frozen=True, slots=True)
class MapTest:
    """The result of a permutation test for each cell of a map."""

    statistics: Any
    """[cells] difference between the two labels' means within groups, divided by its spread under permutation"""
    p_values: Any
    """[cells] p-values, adjusted for looking at every cell"""
    threshold: float
    """the largest absolute statistic of a map with permuted labels exceeds this in 5% of the permutations"""


def permute_map(
    scores: Any, labels: Sequence[bool], groups: Sequence[str], *, permutations: int = 1000, seed: int = 0
) -> MapTest:
    """Test which cells differ between two labels, by permuting labels within each group (a domain). Groups may differ.

    The p-value of a cell is the share of permutations whose largest cell is at least as large (Westfall and Young,
    Resampling-Based Multiple Testing, 1993, section 2.6: single-step max-T). Seeded.

    Args:
        scores: [items, cells].

    Raises:
        ValueError: the numbers of items, labels and groups differ, or no group has both labels.
    """
    table = np.asarray(scores, dtype=float)
    marked, members = np.asarray(labels, dtype=bool), np.asarray(groups)
    if table.ndim != 2 or not len(table) == len(marked) == len(members):
        raise ValueError(f"scores of shape {table.shape} do not fit {len(marked)} labels and {len(members)} groups")
    parts = [np.flatnonzero(members == group) for group in dict.fromkeys(groups)]
    if not any(0 < marked[part].sum() < len(part) for part in parts):
        raise ValueError("no group has both labels, so there is nothing to permute")
    centred = table.copy()
    for part in parts:
        centred[part] -= table[part].mean(axis=0)
    weights = np.empty((permutations + 1, len(table)))
    rng = np.random.default_rng(seed)
    for row in range(permutations + 1):
        for part in parts:
            given = marked[part] if row == 0 else rng.permutation(marked[part])
            # Within a group: mean of the marked items minus mean of the others, weighted by the group's size.
            ones = given.sum()
            mixed = 0 < ones < len(part)
            weights[row, part] = np.where(given, 1 / ones, -1 / (len(part) - ones)) * len(part) if mixed else 0.0
    raw = weights @ centred / len(table)
    spread = raw[1:].std(axis=0)
    standardised = np.divide(raw, spread, out=np.zeros_like(raw), where=spread > 0)
    largest = np.abs(standardised[1:]).max(axis=1)
    observed = standardised[0]
    # The observed map counts as one of the permutations, so no p-value is zero (Phipson and Smyth, 2010).
    p_values = (1 + (largest[:, None] >= np.abs(observed) - 1e-12).sum(axis=0)) / (permutations + 1)
    return MapTest(observed, p_values, float(np.quantile(largest, 0.95)))
