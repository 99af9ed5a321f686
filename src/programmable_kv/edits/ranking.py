"""Rankings for the `selective` mode: strategies that find the later tokens with the notes that matter.

A ranking reads the cache before the edit, and scores for every slot how much recomputing it should help.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.engine import Engine, Rows


class Ranking(Protocol):
    """Scores every slot. Slots with higher scores are recomputed first."""

    rows_to_rank: ClassVar[int]
    """how many rows it computes when no question is asked"""

    def scores(self, engine: Engine, buffer: KVBuffer, reader: Rows) -> torch.Tensor:
        """The scores [S] of all slots.

        `reader` are rows of which the last one reads the decision. They may be computed; the buffer is unchanged
        afterwards.
        """
        ...


@dataclass(frozen=True, slots=True)
class AttentionInfluence:
    """Scores by what the reader takes from a token: attention weight times its value's norm, over layers and heads."""

    rows_to_rank: ClassVar[int] = 1

    def scores(self, engine: Engine, buffer: KVBuffer, reader: Rows) -> torch.Tensor:
        return engine.attention_of(buffer, reader).cpu()


@dataclass(frozen=True, slots=True)
class Recency:
    """Ranks the latest tokens first: a baseline that computes nothing to rank."""

    rows_to_rank: ClassVar[int] = 0

    def scores(self, engine: Engine, buffer: KVBuffer, reader: Rows) -> torch.Tensor:
        return torch.arange(buffer.length, dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class RandomOrder:
    """Ranks tokens at random: the null baseline that a ranking has to beat."""

    seed: int = 0
    rows_to_rank: ClassVar[int] = 0

    def scores(self, engine: Engine, buffer: KVBuffer, reader: Rows) -> torch.Tensor:
        return torch.rand(buffer.length, generator=torch.Generator().manual_seed(self.seed))
