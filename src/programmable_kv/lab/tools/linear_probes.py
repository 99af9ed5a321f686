"""Linear probes: they test whether a label is linearly readable from activations, in domains that the probe never saw.

A probe is trained on all domains but one and scored on that one. Its accuracy is compared with that on control tasks,
whose
labels are random for each kind of item: a probe can only memorise such labels, not read them from the activations.
Source: Hewitt and Liang, Designing and Interpreting Probes with Control Tasks (arXiv 1909.03368), section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from programmable_kv.extras import require_extra
from programmable_kv.lab.statistics.intervals import cluster_interval
from programmable_kv.records import Interval


@dataclass(frozen=True, slots=True)
class ProbeScore:
    """How accurately a probe reads a label in held-out groups."""

    accuracy: Interval
    """accuracy over all items, with an interval from a bootstrap of groups"""
    control: float
    """mean accuracy on control tasks"""
    majority: float
    """share of the more frequent label"""

    @property
    def selectivity(self) -> float:
        """Accuracy minus the accuracy of the same probe on control tasks."""
        return self.accuracy.value - self.control


def probe(
    activations: torch.Tensor,
    labels: Sequence[bool],
    groups: Sequence[str],
    kinds: Sequence[str],
    *,
    controls: int = 10,
    strength: float = 1.0,
    seed: int = 0,
) -> ProbeScore:
    """Fit logistic regressions on standardised activations [items, d], leaving one group out at a time.

    Args:
        kinds: the kind of each item apart from its label (its field's value, say); each kind gets a random control
            label.
        controls: how many control tasks to score.
        strength: inverse of the L2 penalty.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        ValueError: there are fewer than two groups, labels, or (with `controls`) kinds.
    """
    right = _held_out(activations, labels, groups, strength)
    by_group: dict[str, list[float]] = {}
    for group, hit in zip(groups, right, strict=True):
        by_group.setdefault(group, []).append(float(hit))
    accuracy = cluster_interval(by_group, lambda items: sum(items) / len(items), seed=seed)
    rng = np.random.default_rng(seed)
    drawn = [_held_out(activations, control_labels(kinds, labels, rng), groups, strength) for _ in range(controls)]
    share = sum(map(bool, labels)) / len(labels)
    control = float(np.mean(drawn)) if drawn else float("nan")
    return ProbeScore(accuracy, control, max(share, 1 - share))


def control_labels(kinds: Sequence[str], labels: Sequence[bool], rng: np.random.Generator) -> list[bool]:
    """Draw a label for each kind and return each item's. Kinds are true as often as `labels` are; both values occur.

    Raises:
        ValueError: there is only one kind.
    """
    names = list(dict.fromkeys(kinds))
    if len(names) < 2:
        raise ValueError("control tasks need at least two kinds of items")
    true = min(len(names) - 1, max(1, round(len(names) * sum(map(bool, labels)) / len(labels))))
    chosen = set(rng.permutation(len(names))[:true].tolist())
    by_kind = {name: index in chosen for index, name in enumerate(names)}
    return [by_kind[kind] for kind in kinds]


def mean_direction(activations: torch.Tensor, labels: Sequence[bool]) -> torch.Tensor:
    """Return the unit vector [d] from the mean activation [items, d] of the false label to that of the true label.

    Raises:
        ValueError: a label has no items.
    """
    marked = torch.tensor(list(map(bool, labels)), device=activations.device)
    if not bool(marked.any()) or bool(marked.all()):
        raise ValueError("a direction between labels needs items of both labels")
    direction = activations[marked].mean(dim=0) - activations[~marked].mean(dim=0)
    unit: torch.Tensor = direction / direction.norm()
    return unit


def _held_out(activations: torch.Tensor, labels: Sequence[bool], groups: Sequence[str], strength: float) -> Any:
    """Return booleans [items]: whether a probe that never saw an item's group predicts the item's label."""
    require_extra("lab", "sklearn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import LeaveOneGroupOut
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, wanted = activations.to("cpu", torch.float64).numpy(), np.asarray(labels, dtype=bool)
    if len(set(groups)) < 2 or len(set(wanted.tolist())) < 2:
        raise ValueError("scoring a probe on held-out groups needs at least two groups and two labels")
    right = np.zeros(len(wanted), dtype=bool)
    for train, test in LeaveOneGroupOut().split(features, wanted, list(groups)):
        seen = set(wanted[train].tolist())
        if len(seen) < 2:  # all other groups have the same label, so a probe could only predict that one
            right[test] = wanted[test] == seen.pop()
            continue
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
        right[test] = model.fit(features[train], wanted[train]).predict(features[test]) == wanted[test]
    return right
