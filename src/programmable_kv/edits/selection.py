"""Selections: slots to recompute that depend on the tensors, so they are chosen only when a plan is carried out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.span import Span
from programmable_kv.edits.ranking import Ranking
from programmable_kv.engine import Engine, Rows


class Selection(Protocol):
    """Chooses slots of a buffer. The buffer is unchanged afterwards."""

    @property
    def count(self) -> int:
        """How many slots it chooses, at most."""
        ...

    @property
    def rows_to_choose(self) -> int:
        """How many rows it computes in order to choose, not counting a question that is computed anyway."""
        ...

    def choose(self, engine: Engine, buffer: KVBuffer, reader: Rows) -> set[int]:
        """The chosen slots. The last of the `reader` rows reads the decision: it ends a question, or the context."""
        ...


@dataclass(frozen=True, slots=True)
class HighestRanked:
    """Chooses the `wanted` slots that a ranking puts first among some spans; all of them if there are fewer."""

    ranking: Ranking = field(repr=False)
    wanted: int
    among: tuple[Span, ...]

    @property
    def count(self) -> int:
        return min(self.wanted, sum(map(len, self.among)))

    @property
    def rows_to_choose(self) -> int:
        return self.ranking.rows_to_rank

    def choose(self, engine: Engine, buffer: KVBuffer, reader: Rows) -> set[int]:
        if not self.count:
            return set()
        scores = self.ranking.scores(engine, buffer, reader)
        slots = torch.cat([torch.arange(span.start, span.stop) for span in self.among])
        # Among equal scores the later slot comes first: the flip puts it there, and the stable sort keeps it.
        order = scores[slots].flip(0).sort(descending=True, stable=True).indices[: self.count]
        return set(slots.flip(0)[order].tolist())

    def __str__(self) -> str:
        return (
            f"the {self.count} of {sum(map(len, self.among))} tokens that {type(self.ranking).__name__} ranks highest"
        )


@dataclass(frozen=True, slots=True)
class MostDeviating:
    """Chooses the share of a spliced skill's tokens whose keys differ most from keys computed in this context.

    Choosing computes the whole skill once. Source: Yao et al., CacheBlend (arXiv 2405.16444), section 4.
    """

    span: Span
    ids: tuple[int, ...] = field(repr=False)
    share: float

    @property
    def count(self) -> int:
        return round(len(self.span) * self.share)

    @property
    def rows_to_choose(self) -> int:
        return len(self.span)

    def choose(self, engine: Engine, buffer: KVBuffer, reader: Rows) -> set[int]:
        return _highest(_deviations(engine, buffer, self.ids, self.span), self.count, self.span)

    def __str__(self) -> str:
        return f"the {self.count} of {len(self.span)} tokens whose keys deviate most"


@dataclass(frozen=True, slots=True)
class MostAttended:
    """Chooses the tokens of a spliced skill that its last token attends to most."""

    span: Span
    last_id: int = field(repr=False)
    wanted: int

    @property
    def count(self) -> int:
        return min(self.wanted, len(self.span))

    @property
    def rows_to_choose(self) -> int:
        return 1

    def choose(self, engine: Engine, buffer: KVBuffer, reader: Rows) -> set[int]:
        last = self.span.stop - 1
        own = Rows((self.last_id,), (last,), (int(buffer.positions[last]),))
        scores = engine.attention_of(buffer, own)[self.span.start : self.span.stop].cpu()
        return _highest(scores, self.count, self.span)

    def __str__(self) -> str:
        return f"the {self.count} of {len(self.span)} tokens that the last one attends to most"


def _highest(scores: torch.Tensor, count: int, span: Span) -> set[int]:
    return {span.start + token for token in scores.topk(min(count, len(span))).indices.tolist()}


def _deviations(engine: Engine, buffer: KVBuffer, ids: Sequence[int], span: Span) -> torch.Tensor:
    """[n] the relative squared distance of each token's cached keys from keys computed in place, summed over layers.

    With MLA, keys are computed from the latent, so the latents are compared.
    """
    slots = slice(span.start, span.stop)
    cached = [buffer.keys(layer)[:, :, slots].clone() for layer in range(len(buffer))]
    mark = buffer.mark()
    positions = tuple(buffer.positions[slots].tolist())
    engine.compute(buffer, Rows(tuple(ids), tuple(span.range), positions), logits=0)
    deviations = torch.zeros(len(span), dtype=torch.float64)
    for layer, keys in enumerate(cached):
        true = buffer.keys(layer)[:, :, slots]
        off, size = (tensor.cpu().double().pow(2).sum(dim=(0, 1, 3)) for tensor in (true - keys, true))
        deviations += off / size
    buffer.rollback(mark)
    return deviations
