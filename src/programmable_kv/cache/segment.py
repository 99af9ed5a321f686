"""A segment: a run of cached tokens as a value, which is cut out of one context, stored, and spliced into another.

A segment's keys (with MLA, its rotary keys, which are cached as values) are *canonical*: not rotated since they were
computed. Splicing rotates a copy of them, so a segment that was relocated a thousand times is as exact as one that was
relocated once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from programmable_kv.cache.frequencies import Tables
from programmable_kv.cache.layout import Rotated
from programmable_kv.cache.span import Span


@dataclass(frozen=True, slots=True)
class Segment:
    """Token ids with their keys and values in every layer. Immutable: nothing may write to its tensors.

    `keys[layer]` is [B, H, n, D_k] and `values[layer]` [B, H, n, D_v]; `computed_at` [n] is the position of each key.
    """

    ids: tuple[int, ...]
    computed_at: torch.Tensor
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    tables: Tables | None = None
    """the frequency tables that the keys were computed with (`FrequencyRule.table`); None if that was not recorded"""

    def __post_init__(self) -> None:
        count = len(self.ids)
        if self.computed_at.shape != (count,) or len(self.keys) != len(self.values):
            raise ValueError(
                f"a segment of {count} tokens has positions of shape {tuple(self.computed_at.shape)}, keys of "
                f"{len(self.keys)} layers and values of {len(self.values)}"
            )
        for tensor in (*self.keys, *self.values):
            if tensor.ndim != 4 or tensor.shape[2] != count:
                raise ValueError(f"a segment of {count} tokens has a tensor of shape {tuple(tensor.shape)}")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values))

    def tensors(self, name: Rotated) -> tuple[torch.Tensor, ...]:
        """The keys or the values of every layer."""
        return self.keys if name == "keys" else self.values

    def part(self, span: Span) -> Segment:
        """A segment of some of its tokens; the tensors are views."""
        rows = slice(span.start, span.stop)
        return Segment(
            self.ids[rows],
            self.computed_at[rows],
            tuple(tensor[:, :, rows] for tensor in self.keys),
            tuple(tensor[:, :, rows] for tensor in self.values),
            self.tables,
        )
