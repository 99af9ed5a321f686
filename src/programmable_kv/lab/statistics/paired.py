"""Compares two arms on the same items: tests whether one is better (McNemar) or both are equally good (TOST).

An arm's outcome on an item is right or wrong, so a pair of arms is a table of four counts. Only the items on which the
arms differ tell the arms apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PairedCounts:
    """The numbers of items on which both arms, only one arm, or neither arm is right."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @classmethod
    def of(cls, first: Sequence[bool], second: Sequence[bool]) -> PairedCounts:
        """
        Raises:
            ValueError: the arms have different numbers of items.
        """
        pairs = [(bool(a), bool(b)) for a, b in zip(first, second, strict=True)]
        return cls(*(pairs.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False))))

    @property
    def n(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def difference(self) -> float:
        """Share right in the first arm, minus share right in the second."""
        return (self.only_first - self.only_second) / self.n


@dataclass(frozen=True, slots=True)
class Equivalence:
    """The result of two one-sided tests: the arms differ by less than the margin if `p` is small."""

    difference: float
    margin: float
    p_lower: float
    """p-value of the hypothesis that the difference is at most -margin"""
    p_upper: float
    """p-value of the hypothesis that the difference is at least margin"""

    @property
    def p(self) -> float:
        return max(self.p_lower, self.p_upper)


def mcnemar(counts: PairedCounts) -> float:
    """Return the exact two-sided p-value for both arms being right equally often; 1 if they never differ."""
    from statsmodels.stats.contingency_tables import mcnemar as exact

    table = [[counts.both, counts.only_first], [counts.only_second, counts.neither]]
    return float(exact(table, exact=True).pvalue)


def tost_paired(counts: PairedCounts, margin: float) -> Equivalence:
    """Test whether two arms on the same items differ by less than `margin`, as shares of the items.

    Uses score tests. They keep their level with few or no differing items, where a t-test on differences divides by
    zero.
    Source: Tango, Statistics in Medicine 17 (1998), equation 5.

    Raises:
        ValueError: there are no items, or the margin is not between 0 and 1.
    """
    _check(margin, counts.n)
    p_lower = _upper_tail(_score(counts, -margin))
    p_upper = _upper_tail(-_score(counts, margin))
    return Equivalence(counts.difference, margin, p_lower, p_upper)


def tost_independent(right: tuple[int, int], n: tuple[int, int], margin: float) -> Equivalence:
    """Test whether the proportions of two samples of different items differ by less than `margin`.

    Uses score tests (Miettinen, Nurminen).

    Raises:
        ValueError: a sample is empty, or the margin is not between 0 and 1.
    """
    from statsmodels.stats.proportion import tost_proportions_2indep

    _check(margin, min(n))
    found = tost_proportions_2indep(right[0], n[0], right[1], n[1], -margin, margin, method="score", compare="diff")
    lower, upper = float(found.results_larger.pvalue), float(found.results_smaller.pvalue)
    return Equivalence(right[0] / n[0] - right[1] / n[1], margin, lower, upper)


def tost_differences(differences: Sequence[float], margin: float) -> Equivalence:
    """Test whether the mean of paired differences (of gaps, say) is within the margin, with two t-tests.

    Raises:
        ValueError: there are fewer than two differences, or all are equal, so there is no spread to judge by.
    """
    from scipy.stats import ttest_1samp

    if len(differences) < 2 or len(set(differences)) == 1:
        raise ValueError(f"a t-test needs at least two unequal differences; got {len(differences)} without spread")
    lower = float(ttest_1samp(differences, -margin, alternative="greater").pvalue)
    upper = float(ttest_1samp(differences, margin, alternative="less").pvalue)
    return Equivalence(sum(differences) / len(differences), margin, lower, upper)


def _check(margin: float, n: int) -> None:
    if not 0 < margin < 1 or n < 1:
        raise ValueError(
            f"an equivalence test needs items and a margin between 0 and 1; got {n} items, margin {margin}"
        )


def _score(counts: PairedCounts, delta: float) -> float:
    """Return Tango's score statistic for a true difference of `delta`. It is standard normal if `delta` is true."""
    n, b, c = counts.n, counts.only_first, counts.only_second
    linear = -b - c + (2 * n - b + c) * delta
    constant = -c * delta * (1 - delta)
    # The maximum-likelihood share of items on which only the second arm is right, given the difference.
    share = (math.sqrt(max(0.0, linear**2 - 8 * n * constant)) - linear) / (4 * n)
    variance = n * (2 * share + delta * (1 - delta))
    excess = b - c - n * delta
    return excess / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, excess)


def _upper_tail(z: float) -> float:
    return 0.5 * math.erfc(z / math.sqrt(2))
