"""Writes keys and values into a layer's paged cache in vLLM, in each layout that it knows. Unknown layouts are refused.

Shapes: B blocks, H key-value heads, N tokens of a block, D head dim, n tokens to write. In vLLM 0.32 the
cache of a layer is one view [B, H, N, C] in every backend, with any strides, where C = 2 D. Backends differ in how they
order these numbers:

- *split*: a token's key, then its value. FlashAttention, FlashInfer and Triton attention, on GPUs.
- *packed*: a block's keys, then the block's values, each in the order that the CPU's kernel reads. Only vLLM's own
  function can write it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from programmable_kv.errors import UnsupportedModelError

SPLIT = frozenset({"FLASH_ATTN", "FLASHINFER", "TRITON_ATTN"})
PACKED = "CPU_ATTN"

WritePacked = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""(keys [n, H, D], values [n, H, D], the blocks' keys, the blocks' values, slots [n])"""


class PagedLayer(Protocol):
    """One layer's cache in vLLM."""

    def write(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """Write keys and values [H, n, D] of n tokens into slots [n] (block number x block size + offset in block)."""


@dataclass(frozen=True, slots=True)
class SplitLayer:
    """A cache [B, H, N, 2 D] with each token's key before its value."""

    cache: torch.Tensor

    def write(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        size = self.cache.shape[
            2
        ]  # the kernel's block size; its blocks may divide the scheduler's, and slots count the same in both
        blocks, places = slots // size, slots % size
        self.cache[blocks, :, places] = torch.cat((keys, values), dim=-1).transpose(0, 1)


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """A contiguous cache [B, H, N, 2 D]; viewed as [B, H, 2 N, D] it has a block's keys and then the block's values."""

    cache: torch.Tensor
    write_packed: WritePacked

    def write(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        blocks, heads, size, _ = self.cache.shape
        of_keys, of_values = self.cache.view(blocks, heads, 2 * size, -1).chunk(2, dim=2)
        by_token = keys.transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous()
        self.write_packed(by_token[0], by_token[1], of_keys, of_values, slots)


def paged_layer(
    name: str,
    backend: str,
    cache: torch.Tensor,
    *,
    heads: int,
    width: int,
    block_size: int,
    dtype: torch.dtype,
    write_packed: WritePacked | None = None,
) -> PagedLayer:
    """Wrap a layer's cache so that keys and values can be written into it.

    Args:
        name: the layer's name, for messages.
        backend: vLLM's name of the layer's attention backend.
        heads, width, dtype: heads, head dim and dtype of keys and of values, on this worker.
        block_size: tokens of a block, as the scheduler counts them.
        write_packed: vLLM's own function for the packed layout; None for other layouts.

    Raises:
        UnsupportedModelError: the layout is unknown.
    """
    found = f"{name} has a cache of {tuple(cache.shape)}, strides {cache.stride()}, {cache.dtype}, of {backend}"
    again = "The plugin writes only known layouts: serve without the connector, or choose another attention backend."
    if cache.ndim != 4 or cache.shape[1] != heads or cache.shape[3] != 2 * width:
        raise UnsupportedModelError(
            f"{found}; expected [blocks, {heads}, tokens, {2 * width}] (heads, and a key and a value). {again}"
        )
    if cache.dtype != dtype:
        raise UnsupportedModelError(f"{found}; the skills are {dtype}. Use --kv-cache-dtype auto. {again}")
    if block_size % cache.shape[2]:
        raise UnsupportedModelError(
            f"{found}; a block of {block_size} tokens is not a multiple of the kernel's block. {again}"
        )
    if cache.stride(3) != 1 or 0 in cache.stride()[:3]:
        raise UnsupportedModelError(
            f"{found}; a token's numbers must be contiguous and must not overlap others. {again}"
        )
    if backend in SPLIT:
        return SplitLayer(cache)
    if backend == PACKED and write_packed is not None:
        if cache.stride()[1:] != (cache.shape[2] * cache.shape[3], cache.shape[3], 1):
            raise UnsupportedModelError(f"{found}; a block's numbers must be in order. {again}")
        return PackedLayer(cache, write_packed)
    raise UnsupportedModelError(f"{found}; known backends are {', '.join(sorted({*SPLIT, PACKED}))}. {again}")
