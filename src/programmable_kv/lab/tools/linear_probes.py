"""Linear probes: is a label linearly readable from activations, in domains that the probe never saw?

A probe is trained on all domains but one and scored on that one. Beside its accuracy stands that of control tasks, whose labels
are random by kind of item: what a probe can learn of them it has memorised, not read.
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
    """How well a label is read in held-out groups."""

    accuracy: Interval
    """over all items, with a bootstrap of groups"""
    control: float
    """mean accuracy on control tasks"""
    majority: float
    """share of the commoner label"""

    @property
    def selectivity(self) -> float:
        """Accuracy beyond what the same probe gets on labels that mean nothing."""
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
    """Logistic regression on standardised activations [items, d], leaving one group out at a time.

    Args:
        kinds: what an item is apart from its label (its field's value, say): control labels are random by kind.
        strength: inverse of the L2 penalty.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        ValueError: fewer than two groups or labels.
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
    """A random label for each kind, as often true as the labels are, and both at least once.

    Raises:
        ValueError: there is one kind only.
    """
    names = list(dict.fromkeys(kinds))
    if len(names) < 2:
        raise ValueError("control tasks need items of at least two kinds")
    true = min(len(names) - 1, max(1, round(len(names) * sum(map(bool, labels)) / len(labels))))
    chosen = set(rng.permutation(len(names))[:true].tolist())
    by_kind = {name: index in chosen for index, name in enumerate(names)}
    return [by_kind[kind] for kind in kinds]


def mean_direction(activations: torch.Tensor, labels: Sequence[bool]) -> torch.Tensor:
    """The unit vector [d] from the mean of one label's activations [items, d] to that of the other.

    Raises:
        ValueError: a label has no items.
    """
    marked = torch.tensor(list(map(bool, labels)), device=activations.device)
    if not bool(marked.any()) or bool(marked.all()):
        raise ValueError("a direction between labels needs items of both")
    direction = activations[marked].mean(dim=0) - activations[~marked].mean(dim=0)
    unit: torch.Tensor = direction / direction.norm()
    return unit


def _held_out(activations: torch.Tensor, labels: Sequence[bool], groups: Sequence[str], strength: float) -> Any:
    """[items] booleans: was the item's label found by a probe that never saw its group?"""
    require_extra("lab", "sklearn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import LeaveOneGroupOut
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, wanted = activations.to("cpu", torch.float64).numpy(), np.asarray(labels, dtype=bool)
    if len(set(groups)) < 2 or len(set(wanted.tolist())) < 2:
        raise ValueError("a probe that is scored on held-out groups needs two groups and two labels")
    right = np.zeros(len(wanted), dtype=bool)
    for train, test in LeaveOneGroupOut().split(features, wanted, list(groups)):
        seen = set(wanted[train].tolist())
        if len(seen) < 2:  # every other group has one label: that is all a probe could know
            right[test] = wanted[test] == seen.pop()
            continue
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
        right[test] = model.fit(features[train], wanted[train]).predict(features[test]) == wanted[test]
    return right
