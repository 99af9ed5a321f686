"""Attention masks from positions.

transformers builds masks from slot indices. That is right as long as every slot's position is its index and the new
rows are the last ones; for rows in the middle of a context, or a context with holes, the mask must come from positions.
"""

from __future__ import annotations

import torch

from programmable_kv.cache.layout import KVLayout, Reach


def visible(queries: torch.Tensor, keys: torch.Tensor, reach: Reach, window: int | None) -> torch.Tensor:
    """[T, S] booleans: may the query at each position [T] attend to the key at each position [S]?"""
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
    layout: KVLayout, queries: torch.Tensor, keys: torch.Tensor, *, additive: torch.dtype | None
) -> torch.Tensor | dict[str, torch.Tensor]:
    """The mask(s) to hand to a model, [1, 1, T, S]: one tensor, or one per layer type if types differ.

    `additive` is the dtype of an eager mask (0 and the dtype's minimum); None gives booleans.
    """
    made: dict[str, torch.Tensor] = {}
    for reach, window in layout.reaches:
        mask = visible(queries, keys, reach, window)[None, None]
        if additive is not None:
            bias = torch.zeros(mask.shape, dtype=additive, device=mask.device)
            mask = bias.masked_fill(~mask, torch.finfo(additive).min)
        made[reach.value] = mask
    return next(iter(made.values())) if len(made) == 1 else made
