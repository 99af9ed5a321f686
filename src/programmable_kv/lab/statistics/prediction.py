"""Measures how well features predict an outcome in groups that the predictor never saw (area under the ROC curve).

Pooled over left-out groups, chance is not exactly one half: if the left-out group has many failures, its training set
has few. So the null is measured, by the same procedure with labels permuted within each group.
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
"""inverse of the L2 penalty; with few failures, a weaker penalty fits noise"""


@dataclass(frozen=True, slots=True)
class Predicted:
    """How well a predictor ranks items of held-out groups by an outcome."""

    auc: Interval
    """area under the curve, with an interval from a bootstrap of groups; 1: every failure ranks above every success"""
    chance: float
    """mean area with permuted labels"""
    chance_high: float
    """95% quantile of the area with permuted labels"""
    p: float


def area(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Return the probability that an item with the label scores higher than one without it; ties count half.

    Raises:
        ValueError: only one of the labels occurs.
    """
    from scipy.stats import rankdata

    marked = np.asarray(labels, dtype=bool)
    ones = int(marked.sum())
    if not 0 < ones < len(marked):
        raise ValueError("the area under the curve needs items with and without the label")
    ranks = rankdata(np.asarray(scores, dtype=float))
    return float((ranks[marked].sum() - ones * (ones + 1) / 2) / (ones * (len(marked) - ones)))


def held_out_scores(features: Any, labels: Sequence[bool], groups: Sequence[str]) -> Any:
    """Return [items] log-odds of the label, by logistic regression on standardised features [items, d].

    Each group's items are scored by a regression that was fit on the other groups; 0 if these have only one label.

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
    """Rank the items of each group by a predictor that was fit on the other groups. Seeded.

    Raises:
        ValueError: only one of the labels occurs, or there is only one group.
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
    # A resample with only one label has no area, so it counts as chance.
    return area(scores, labels) if 0 < sum(labels) < len(labels) else 0.5
