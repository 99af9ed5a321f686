"""Can an outcome be predicted from features, in groups that the predictor never saw? By the area under the ROC curve.

Pooled over left-out groups, chance is not exactly one half: a group with many failures was left out of a training set that
therefore has few. So the null is measured: the same with labels permuted within each group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from programmable_kv.extras import require_extra
from programmable_kv.lab.statistics.intervals import cluster_interval
from programmable_kv.records import Interval

STRENGTH = 0.1
"""inverse of the L2 penalty: with few failures, a weaker one fits noise"""


@dataclass(frozen=True, slots=True)
class Predicted:
    """How well an outcome is ranked in held-out groups."""

    auc: Interval
    """with a bootstrap of groups; 1: every failure is ranked above every success"""
    chance: float
    """mean over permuted labels"""
    chance_high: float
    """95% of the permutations are below"""
    p: float


def area(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """The chance that an item with the label has a higher score than one without it; ties count half.

    Raises:
        ValueError: not both labels occur.
    """
    from scipy.stats import rankdata

    marked = np.asarray(labels, dtype=bool)
    ones = int(marked.sum())
    if not 0 < ones < len(marked):
        raise ValueError("an area under the curve needs items with and without the label")
    ranks = rankdata(np.asarray(scores, dtype=float))
    return float((ranks[marked].sum() - ones * (ones + 1) / 2) / (ones * (len(marked) - ones)))


def held_out_scores(features: Any, labels: Sequence[bool], groups: Sequence[str]) -> Any:
    """[items] log-odds of the label by logistic regression on standardised features [items, d], fit on the other groups.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    require_extra("lab", "sklearn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import LeaveOneGroupOut
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    table, wanted = np.asarray(features, dtype=float), np.asarray(labels, dtype=bool)
    scores = np.zeros(len(wanted))
    for train, test in LeaveOneGroupOut().split(table, wanted, list(groups)):
        if 0 < wanted[train].sum() < len(train):
            model = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=1000))
            scores[test] = model.fit(table[train], wanted[train]).decision_function(table[test])
    return scores


def predicted(
    features: Any, labels: Sequence[bool], groups: Sequence[str], *, permutations: int = 100, seed: int = 0
) -> Predicted:
    """Rank items of each group by a predictor that was fit on the others. Seeded.

    Raises:
        ValueError: not both labels occur, or there is one group.
        MissingExtraError: scikit-learn is not installed.
    """
    scores = held_out_scores(features, labels, groups)
    found = area(scores, labels)
    marked, members = np.asarray(labels, dtype=bool), np.asarray(groups)
    rng = np.random.default_rng(seed)
    null = np.empty(permutations)
    for index in range(permutations):
        permuted = marked.copy()
        for group in dict.fromkeys(groups):
            part = np.flatnonzero(members == group)
            permuted[part] = rng.permutation(permuted[part])
        null[index] = area(held_out_scores(features, permuted.tolist(), groups), permuted.tolist())
    clusters: dict[str, list[tuple[float, bool]]] = {}
    for group, score, label in zip(groups, scores.tolist(), labels, strict=True):
        clusters.setdefault(group, []).append((score, bool(label)))
    interval = cluster_interval(clusters, _area_of)
    # The observed labels count as one of the permutations, so that p is never zero (Phipson and Smyth, 2010).
    p = (1 + int((null >= found).sum())) / (permutations + 1)
    return Predicted(interval, float(null.mean()), float(np.quantile(null, 0.95)), p)


def _area_of(items: Sequence[tuple[float, bool]]) -> float:
    scores, labels = zip(*items, strict=True)
    # A resample without failures says nothing either way.
    return area(scores, labels) if 0 < sum(labels) < len(labels) else 0.5
