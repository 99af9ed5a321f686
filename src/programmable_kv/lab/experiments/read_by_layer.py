"""Probes by layer, fit on the items of some policies and scored on those of others, with control tasks for comparison.

Control labels are random for each kind of item (an action), and true as often as the labels. What a probe finds of them
it has memorised. Source: Hewitt and Liang, Designing and Interpreting Probes with Control Tasks (arXiv 1909.03368),
section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from programmable_kv.extras import require_extra
from programmable_kv.lab.tools.linear_probes import control_labels

CONTROLS = 3
"""Number of control tasks."""
STRENGTH = 1.0
"""Inverse of the probes' L2 penalty."""


@dataclass(frozen=True, slots=True)
class Items:
    """Activations, and the labels to read from them."""

    streams: torch.Tensor
    """The residual stream before each layer and after the last one, [L + 1, items, d]."""
    labels: tuple[bool, ...]
    kinds: tuple[str, ...]
    """What each item is apart from its label."""

    @classmethod
    def together(cls, several: Sequence[Items]) -> Items:
        """Join the items of several policies."""
        return cls(
            torch.cat([each.streams for each in several], dim=1),
            tuple(label for each in several for label in each.labels),
            tuple(kind for each in several for kind in each.kinds),
        )

    def at(self, layer: int) -> tuple[torch.Tensor, list[bool], list[str]]:
        """The streams [items, d], labels and kinds at one layer."""
        return self.streams[layer], list(self.labels), list(self.kinds)


class LayerProbes:
    """A logistic regression for each layer, and those of the control tasks. Fit when `read` is first called."""

    def __init__(self, items: Items) -> None:
        self._items = items
        self._probes: list[list[Any]] | None = None

    def read(self, items: Items, seed: int) -> dict[str, list[float]]:
        """By layer, the share of other items whose label is found (`applies`), and the mean for controls (`control`).

        Raises:
            MissingExtraError: scikit-learn is not installed.
        """
        if self._probes is None:
            self._probes = [self._fitted(layer) for layer in range(len(self._items.streams))]
        rng = np.random.default_rng(seed)
        hidden = [control_labels(items.kinds, items.labels, rng) for _ in range(CONTROLS)]
        found: dict[str, list[float]] = {"applies": [], "control": []}
        for layer, (probe, *controls) in enumerate(self._probes):
            rows = items.streams[layer].to("cpu", torch.float64).numpy()
            found["applies"].append(float(np.mean(probe.predict(rows) == np.asarray(items.labels))))
            hits = [np.mean(it.predict(rows) == np.asarray(given)) for it, given in zip(controls, hidden, strict=True)]
            found["control"].append(float(np.mean(hits)))
        return found

    def _fitted(self, layer: int) -> list[Any]:
        require_extra("lab", "sklearn")
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        streams, labels, kinds = self._items.at(layer)
        rng = np.random.default_rng(0)
        tasks = [labels, *(control_labels(kinds, labels, rng) for _ in range(CONTROLS))]
        rows = streams.to("cpu", torch.float64).numpy()
        return [
            make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=1000)).fit(rows, np.asarray(task))
            for task in tasks
        ]
