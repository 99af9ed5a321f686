"""What is learnt of conclusions on some policies, to be scored on policies of other domains: probes, directions, subspaces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from programmable_kv.extras import require_extra
from programmable_kv.lab.experiments.note_rows import NoteRows
from programmable_kv.lab.experiments.pair import Pair, appended_last
from programmable_kv.lab.tools.alignment import Exchange, align
from programmable_kv.lab.tools.linear_probes import control_labels, mean_direction
from programmable_kv.lab.tools.sites import Place, Site

DIMENSIONS = (1, 2, 4, 8)
STEPS, BATCH = 3, 4
"""steps of gradient descent for each example, and examples of a step"""
RATE = 0.005
"""small: it starts where notes change, and Adam's first steps move every entry by as much"""
CONTROLS = 3
"""control tasks: labels that are random by action"""
STRENGTH = 1.0
"""inverse of the probes' L2 penalty"""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """What a policy gives to learn from."""

    domain: str
    old: torch.Tensor
    """[L + 1, notes, d]: the notes' streams in the old context"""
    new: torch.Tensor
    applies: list[bool]
    """of the old context's notes; in the new one the opposite holds"""
    kinds: list[str]
    """each note's action"""
    exchange: Exchange

    @classmethod
    def of(cls, pair: Pair, notes: NoteRows) -> Example:
        old, new = notes.streams(pair.old), notes.streams(pair.fresh)
        buffer, rows = appended_last(pair, pair.old, notes.slots)
        wanted, span = pair.scale.new, max(pair.scale.new - pair.scale.old, 1e-6)
        gap_in = pair.gap_in
        exchange = Exchange(buffer, rows, new, lambda logits: ((gap_in(logits) - wanted) / span) ** 2, rows.slots[:-1])
        return cls(pair.case.domain, old, new, notes.applies["old"], list(pair.actions), exchange)

    def at(self, layer: int) -> Exchange:
        """The exchange of the notes' streams before a layer."""
        own = self.exchange
        return Exchange(own.buffer, own.rows, self.new[layer], own.loss, own.slots)


@dataclass(slots=True, eq=False)
class Learned:
    """Of the examples of some domains."""

    examples: Sequence[Example]
    _probes: list[list[Any]] | None = None
    _subspaces: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def items(self, layer: int) -> tuple[torch.Tensor, list[bool], list[str]]:
        """Every note of both contexts: streams [items, d], whether its rule applies, its action."""
        rows = [part[layer] for each in self.examples for part in (each.old, each.new)]
        labels = [label for each in self.examples for label in (*each.applies, *(not it for it in each.applies))]
        return torch.cat(rows), labels, [kind for each in self.examples for kind in (*each.kinds, *each.kinds)]

    def direction(self, layer: int) -> tuple[torch.Tensor, float, torch.Tensor]:
        """From what does not apply to what does: the unit vector [d], the distance of the means, and their midpoint."""
        streams, labels, _ = self.items(layer)
        unit = mean_direction(streams, labels)
        marked = torch.tensor(labels, device=streams.device)
        means = streams[marked].mean(dim=0), streams[~marked].mean(dim=0)
        return unit, float((means[0] - means[1]) @ unit), (means[0] + means[1]) / 2

    def covariance(self, layer: int) -> torch.Tensor:
        """[d, d] of the streams."""
        streams = self.items(layer)[0].to("cpu", torch.float64)
        return torch.cov(streams.T)

    def changes(self, layer: int, dimensions: int) -> torch.Tensor:
        """The subspace [d, k] in which most of what changes between the contexts lies; of few examples, filled up."""
        apart = torch.cat([each.new[layer] - each.old[layer] for each in self.examples])
        found = torch.linalg.svd(apart.to("cpu", torch.float64), full_matrices=False).Vh[:dimensions].T
        filling = torch.randn(len(found), dimensions, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        basis: torch.Tensor = torch.linalg.qr(torch.cat((found, filling), dim=1)).Q[:, :dimensions].to(apart)
        return basis

    def subspace(self, engine: Any, layer: int, dimensions: int) -> torch.Tensor:
        """The subspace [d, k] along which exchanged notes give the new decision, learnt by gradients (DAS)."""
        key = (layer, dimensions)
        if key not in self._subspaces:
            exchanges = [each.at(layer) for each in self.examples]
            start, batch = self.changes(layer, dimensions), min(BATCH, len(exchanges))
            site = Site(Place.RESIDUAL, layer)
            found = align(
                engine, site, exchanges, dimensions, steps=STEPS * len(exchanges), rate=RATE, start=start, batch=batch
            )
            self._subspaces[key] = found.basis
        return self._subspaces[key]

    def read(
        self, streams: torch.Tensor, labels: Sequence[bool], kinds: Sequence[str], seed: int
    ) -> dict[str, list[float]]:
        """By layer, the share of notes [L + 1, items, d] whose label the probes find; and of control labels, on average."""
        probes = self.probes()
        rng = np.random.default_rng(seed)
        hidden = [control_labels(kinds, labels, rng) for _ in range(CONTROLS)]
        found: dict[str, list[float]] = {"applies": [], "control": []}
        for layer, (probe, *controls) in enumerate(probes):
            rows = streams[layer].to("cpu", torch.float64).numpy()
            found["applies"].append(float(np.mean(probe.predict(rows) == np.asarray(labels))))
            hits = [np.mean(it.predict(rows) == np.asarray(given)) for it, given in zip(controls, hidden, strict=True)]
            found["control"].append(float(np.mean(hits)))
        return found

    def probes(self) -> list[list[Any]]:
        """By layer, a logistic regression for whether a rule applies, and those for the control tasks."""
        if self._probes is None:
            self._probes = [self._fitted(layer) for layer in range(len(self.examples[0].old))]
        return self._probes

    def _fitted(self, layer: int) -> list[Any]:
        require_extra("lab", "sklearn")
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        streams, labels, kinds = self.items(layer)
        rng = np.random.default_rng(0)
        tasks = [labels, *(control_labels(kinds, labels, rng) for _ in range(CONTROLS))]
        rows = streams.to("cpu", torch.float64).numpy()
        return [
            make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=1000)).fit(rows, np.asarray(task))
            for task in tasks
        ]


@dataclass(slots=True, eq=False)
class Examples:
    """Examples by model and policy, kept while a run lasts, and what was learnt of sets of them."""

    made: dict[tuple[str, int], Example] = field(default_factory=dict)
    learned: dict[tuple[str, tuple[int, ...]], Learned] = field(default_factory=dict)

    def add(self, pair: Pair) -> None:
        self.made[pair.model.fingerprint, pair.case.number] = Example.of(pair, NoteRows(pair))

    def of(self, fingerprint: str, numbers: Sequence[int], again: Callable[[int], Pair]) -> Learned:
        """What policies with these numbers teach. Those that a resumed run has not made are made `again`."""
        key = (fingerprint, tuple(sorted(numbers)))
        if key not in self.learned:
            for number in key[1]:
                if (fingerprint, number) not in self.made:
                    self.add(again(number))
            self.learned[key] = Learned([self.made[fingerprint, number] for number in key[1]])
        return self.learned[key]
