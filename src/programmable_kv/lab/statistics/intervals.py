"""Confidence intervals: an exact one for a proportion, and one for any statistic of items that come in clusters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from programmable_kv.records import Interval

Item = TypeVar("Item")


def clopper_pearson(successes: int, n: int) -> Interval:
    """Return a proportion with its exact 95% interval, which covers any true proportion at least 95% of the time."""
    from statsmodels.stats.proportion import proportion_confint

    if n == 0:
        return Interval(value=float("nan"), low=0.0, high=1.0, n=0, method="clopper-pearson")
    low, high = proportion_confint(successes, n, alpha=0.05, method="beta")
    return Interval(value=successes / n, low=float(low), high=float(high), n=n, method="clopper-pearson")


def cluster_interval(
    clusters: Mapping[str, Sequence[Item]],
    statistic: Callable[[Sequence[Item]], float],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return a statistic of all items, with a percentile interval from resampled clusters (domains, say). Seeded.

    For a plain mean, `records.cluster_bootstrap` is faster.

    Raises:
        ValueError: there are fewer than two clusters, so nothing shows how clusters vary.
    """
    import numpy as np

    groups = [list(items) for items in clusters.values()]
    if len(groups) < 2:
        raise ValueError(f"a cluster bootstrap needs several clusters, got {len(groups)}")
    drawn = np.random.default_rng(seed).integers(len(groups), size=(resamples, len(groups)))
    found = [statistic([item for index in row for item in groups[index]]) for row in drawn]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    items = [item for group in groups for item in group]
    return Interval(
        value=float(statistic(items)), low=float(low), high=float(high), n=len(items), method="cluster bootstrap"
    )
