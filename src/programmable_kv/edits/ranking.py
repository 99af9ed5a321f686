"""Which later tokens carry the notes that matter: strategies for the `selective` mode.

A ranking sees the cache before the edit and gives, for every slot, how much refreshing it should help.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.engine import Engine, Rows


class Ranking(Protocol):
    """Scores of every slot, [S]; higher is refreshed first."""

    rows_to_rank: ClassVar[int]
    """how many rows it computes where no question is asked"""

    def scores(self, engine: Engine, buffer: KVBuffer, reader: Rows) -> torch.Tensor:
        """`reader` are the rows whose last one reads the decision; they may be computed, the buffer is unchanged afterwards."""
        ...


@dataclass(frozen=True, slots=True)
class AttentionInfluence:
    """By what the reader takes from each token: attention weight times the norm of its value, over layers and heads."""

    rows_to_rank: ClassVar[int] = 1

    def scores(self, engine: Engine, buffer: KVBuffer, reader: Rows) -> torch.Tensor:
        return engine.attention_of(buffer, reader).cpu()


@dataclass(frozen=True, slots=True)
class Recency:
    """The latest tokens first: the baseline that costs nothing to rank."""

    rows_to_rank: ClassVar[int] = 0

    def scores(self, engine: Engine, buffer: KVBuffer, reader: Rows) -> torch.Tensor:
        return torch.arange(buffer.length, dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class RandomOrder:
    """Any tokens: the null that a ranking has to beat."""

    seed: int = 0
    rows_to_rank: ClassVar[int] = 0

    def scores(self, engine: Engine, buffer: KVBuffer, reader: Rows) -> torch.Tensor:
        return torch.rand(buffer.length, generator=torch.Generator().manual_seed(self.seed))
