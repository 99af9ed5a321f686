"""Replacement keys and values for some slots of one layer, which `KVBuffer.overwrite` writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from programmable_kv.errors import CacheBufferError

if TYPE_CHECKING:
    from programmable_kv.cache.buffer_layer import BufferLayer


@dataclass(frozen=True, slots=True, eq=False)
class Overwrite:
    """Keys and values [B, h, n, D] for h KV heads and n slots of a layer; None leaves them unchanged."""

    layer: int
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    heads: tuple[int, ...] | None = None
    """the KV heads to overwrite; None means all"""

    def check(self, layers: int, layer: BufferLayer, slots: int) -> None:
        """
        Raises:
            CacheBufferError: a head does not exist, or a tensor has another shape than expected.
        """
        for name, rows, held in (("keys", self.keys, layer.keys), ("values", self.values, layer.values)):
            if rows is None:
                continue
            assert held is not None
            heads = range(held.shape[1]) if self.heads is None else self.heads
            expected = (held.shape[0], len(heads), slots, held.shape[-1])
            if tuple(rows.shape) != expected or not set(heads) <= set(range(held.shape[1])):
                raise CacheBufferError(
                    f"{name} of shape {list(rows.shape)} do not fit heads {list(heads)} and {slots} slots of layer "
                    f"{self.layer} (of {layers}), which has {held.shape[1]} heads: expected {list(expected)}"
                )

    def put(self, layer: BufferLayer, where: torch.Tensor) -> None:
        """Write into the layer's slots `where` [n]."""
        for rows, held in ((self.keys, layer.keys), (self.values, layer.values)):
            if rows is not None:
                assert held is not None
                heads = torch.arange(held.shape[1]) if self.heads is None else torch.tensor(self.heads)
                held[:, heads[:, None], where[None]] = rows.to(held)
