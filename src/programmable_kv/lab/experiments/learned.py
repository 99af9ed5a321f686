"""Learns about conclusions from some policies, to score on policies of other domains: probes, directions, subspaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from programmable_kv.lab.experiments.note_rows import NoteRows
from programmable_kv.lab.experiments.pair import Pair, appended_last
from programmable_kv.lab.experiments.read_by_layer import Items, LayerProbes
from programmable_kv.lab.tools.alignment import Exchange, align
from programmable_kv.lab.tools.linear_probes import mean_direction
from programmable_kv.lab.tools.nulls import random_basis
from programmable_kv.lab.tools.sites import Place, Site

DIMENSIONS = (1, 2, 4, 8)
STEPS, BATCH = 3, 4
"""Steps of gradient descent for each example, and examples in each step."""
RATE = 0.005
"""Small, because training starts where notes change and Adam's first steps move every entry by this much."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """What a policy gives to learn from."""

    notes: Items
    """Notes of both contexts, and whether their rules apply."""
    old: torch.Tensor
    """Streams of the notes in the old context, [L + 1, notes, d]."""
    new: torch.Tensor
    exchange: Exchange

    @classmethod
    def of(cls, pair: Pair) -> Example:
        notes = NoteRows(pair)
        old, new = notes.streams(pair.old), notes.streams(pair.fresh)
        buffer, rows = appended_last(pair, pair.old, notes.slots)
        wanted, span = pair.scale.new, max(pair.scale.new - pair.scale.old, 1e-6)
        gap_in = pair.gap_in
        exchange = Exchange(buffer, rows, new, lambda logits: ((gap_in(logits) - wanted) / span) ** 2, rows.slots[:-1])
        return cls(notes.items(old, new), old, new, exchange)

    def at(self, layer: int) -> Exchange:
        """The exchange of the notes' streams before a layer."""
        own = self.exchange
        return Exchange(own.buffer, own.rows, self.new[layer], own.loss, own.slots)


class Learned:
    """What is learnt from the examples of some domains."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples
        self.items = Items.together([each.notes for each in examples])
        self.probes = LayerProbes(self.items)
        self._subspaces: dict[tuple[int, int], torch.Tensor] = {}
        self._changes: dict[tuple[int, int], torch.Tensor] = {}
        self._random: dict[tuple[int, int, int], torch.Tensor] = {}

    def direction(self, layer: int) -> tuple[torch.Tensor, float, torch.Tensor]:
        """From notes whose rule does not apply to the others: unit vector [d], the means' distance and midpoint."""
        streams, labels, _ = self.items.at(layer)
        return along_means(streams, labels)

    def covariance(self, layer: int) -> torch.Tensor:
        """Covariance of the streams, [d, d]."""
        return torch.cov(self.items.streams[layer].to("cpu", torch.float64).T)

    def changes(self, layer: int, dimensions: int) -> torch.Tensor:
        """The subspace [d, k] of most of the change between the contexts; filled up at random if examples are few."""
        if (layer, dimensions) not in self._changes:
            self._changes[layer, dimensions] = self._most_of_changes(layer, dimensions)
        return self._changes[layer, dimensions]

    def random(self, layer: int, dimensions: int, seed: int) -> torch.Tensor:
        """A random subspace [d, k], drawn with the covariance of the streams."""
        key = (layer, dimensions, seed)
        if key not in self._random:
            shaped = self.changes(layer, dimensions)
            self._random[key] = random_basis(shaped, seed, covariance=self.covariance(layer))
        return self._random[key]

    def _most_of_changes(self, layer: int, dimensions: int) -> torch.Tensor:
        apart = torch.cat([each.new[layer] - each.old[layer] for each in self.examples])
        found = torch.linalg.svd(apart.to("cpu", torch.float64), full_matrices=False).Vh[:dimensions].T
        filling = torch.randn(len(found), dimensions, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        basis: torch.Tensor = torch.linalg.qr(torch.cat((found, filling), dim=1)).Q[:, :dimensions].to(apart)
        return basis

    def subspace(self, engine: Any, layer: int, dimensions: int) -> torch.Tensor:
        """The subspace [d, k] in which exchanged notes give the new decision, learnt by gradients (DAS)."""
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


def along_means(streams: torch.Tensor, labels: Sequence[bool]) -> tuple[torch.Tensor, float, torch.Tensor]:
    """The unit vector between the labels' means of activations [items, d], the means' distance, and their midpoint."""
    unit = mean_direction(streams, labels)
    marked = torch.tensor(list(labels), device=streams.device)
    means = streams[marked].mean(dim=0), streams[~marked].mean(dim=0)
    return unit, float((means[0] - means[1]) @ unit), (means[0] + means[1]) / 2
