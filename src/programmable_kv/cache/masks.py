"""Attention masks from positions.

transformers builds masks from slot indices. That is correct only if every slot's position equals its index and the new
rows are the last ones. For rows in the middle of a context, or a context with holes, the mask must use positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from programmable_kv.cache.layout import KVLayout, Reach


@dataclass(frozen=True, slots=True, eq=False)
class PartReads:
    """Which parts of a context may read which: a block mask that applies in addition to the order of positions."""

    part_of: torch.Tensor
    """[S] the index of the part that each slot belongs to"""
    reads: torch.Tensor
    """[parts, parts] booleans: whether tokens of the first part may read those of the second"""

    def allowed(self, slots: Sequence[int], visible: int) -> torch.Tensor:
        """[T, visible] booleans: whether the row in each of these T slots may read each of the first slots."""
        rows = self.reads[self.part_of[torch.tensor(slots, dtype=torch.long)]]
        return rows[:, self.part_of[:visible]]


def visible(queries: torch.Tensor, keys: torch.Tensor, reach: Reach, window: int | None) -> torch.Tensor:
    """[T, S] booleans: whether the query at each position [T] may attend to the key at each position [S]."""
    query, key = queries[:, None], keys[None, :]
    allowed = key <= query
    if reach is Reach.SLIDING:
        assert window is not None
        allowed = allowed & (key > query - window)
    elif reach is Reach.CHUNKED:
        assert window is not None
        allowed = allowed & (key // window == query // window)
    return allowed


def attention_masks(
    layout: KVLayout,
    queries: torch.Tensor,
    keys: torch.Tensor,
    *,
    additive: torch.dtype | None,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """The mask(s) to pass to a model, [1, 1, T, S]: one tensor, or one per layer type if types differ.

    `additive` is the dtype of an eager mask (0 and the dtype's minimum); None gives booleans. `allowed`, [T, S]
    booleans, further restricts the mask.
    """
    made: dict[str, torch.Tensor] = {}
    for reach, window in layout.reaches:
        mask = visible(queries, keys, reach, window)
        mask = (mask if allowed is None else mask & allowed)[None, None]
        if additive is not None:
            bias = torch.zeros(mask.shape, dtype=additive, device=mask.device)
            mask = bias.masked_fill(~mask, torch.finfo(additive).min)
        made[reach.value] = mask
    return next(iter(made.values())) if len(made) == 1 else made
