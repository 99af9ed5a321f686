"""Measures whether two scores order the same items alike."""

from __future__ import annotations

from collections.abc import Sequence


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation; None if a score is the same for all items, so that there is no order."""
    import numpy as np
    from scipy.stats import rankdata

    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    # scipy's `spearmanr` also tests significance, which takes most of its time.
    return float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])


def overlap(first: Sequence[float], second: Sequence[float], count: int) -> float:
    """Return the share of the first score's best `count` items that are among the second's; ties favour later items."""
    best = [set(sorted(range(len(each)), key=lambda i: (-each[i], -i))[:count]) for each in (first, second)]
    return len(best[0] & best[1]) / len(best[0]) if best[0] else 0.0
