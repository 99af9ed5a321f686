"""Attention in blocks of rows, attention with a soft cap, and what the last row of a forward attends to.

`recording` collects, within its block and its thread, what the last row attends to in every layer that runs this
package's attention (`transformers_api.grouped_sdpa`). Nothing of the model is changed.

Shapes: query [B, groups * H, T, D], key and value [B, H, S, D], mask [B, 1, T, S] or None (then causal, the last rows of S).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

ROWS_IN_BLOCK = 256
"""Rows that attend at once. Fewer rows skip more of what they cannot see, and cost more calls. Measured on a CPU, 2048 rows
against 8192 slots, 9 heads: 64 rows 913 ms, 128 812 ms, 256 496 ms, 512 589 ms, all at once 1042 ms."""


@dataclass(frozen=True, slots=True, eq=False)
class LastRow:
    """The attention of a forward's last row in one layer."""

    query: torch.Tensor
    """[groups * H, D]"""
    scores: torch.Tensor
    """[groups * H, S] in float32 or wider: capped, and minus infinity where a slot is not seen"""
    scaling: float
    softcap: float | None

    @property
    def weights(self) -> torch.Tensor:
        """[groups * H, S]"""
        return self.scores.softmax(dim=-1)


_recorder: ContextVar[list[LastRow] | None] = ContextVar("recorder", default=None)


@contextmanager
def recording() -> Iterator[list[LastRow]]:
    """Collect the last row's attention, one entry for each layer in order."""
    rows: list[LastRow] = []
    token = _recorder.set(rows)
    try:
        yield rows
    finally:
        _recorder.reset(token)


def record(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> None:
    """Record what the last row attends to, inside a `recording` block."""
    recorder = _recorder.get()
    if recorder is not None:
        last = None if mask is None else mask[..., -1:, :]
        scores = attention_scores(query[:, :, -1:], key, last, scaling, softcap)[0, :, 0]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        recorder.append(LastRow(query[0, :, -1].detach(), scores.detach(), scale, softcap))


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """softmax(cap(q k^T scale) + mask) in float32 or wider, [B, groups * H, T, S]."""
    return attention_scores(query, key, mask, scaling, softcap).softmax(dim=-1)


def attention_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """cap(q k^T scale) + mask in float32 or wider, [B, groups * H, T, S].

    Source of the cap: Gemma 2 (arXiv 2408.00118), section 2.
    """
    batch, heads, tokens, width = query.shape
    groups, slots = heads // key.shape[1], key.shape[2]
    scale = width**-0.5 if scaling is None else scaling
    compute = torch.promote_types(query.dtype, torch.float32)
    folded = query.reshape(batch, key.shape[1], groups * tokens, width)
    scores = (torch.matmul(folded, key.transpose(2, 3)) * scale).to(compute).view(batch, heads, tokens, slots)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None and tokens > 1:
        mask = tail_mask(tokens, slots, query.device)
    if mask is not None:
        mask = mask[..., :slots]
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores


def tail_mask(rows: int, slots: int, device: torch.device) -> torch.Tensor:
    """[rows, slots] booleans: the causal mask of rows that are the last of the slots."""
    return torch.ones(rows, slots, dtype=torch.bool, device=device).tril(slots - rows)


def soft_capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    """Attention with soft-capped scores, [B, T, groups * H, D]. Scores are held in full: [B, groups * H, T, S]."""
    batch, heads, tokens, _ = query.shape
    weights = attention_weights(query, key, mask, scaling, softcap).to(value.dtype)
    groups = heads // key.shape[1]
    folded = weights.view(batch, key.shape[1], groups * tokens, key.shape[2])
    return torch.matmul(folded, value).view(batch, heads, tokens, value.shape[-1]).transpose(1, 2).contiguous()


def last_rows(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """Causal attention of rows that are the last of the slots, [B, T, groups * H, D], without a mask of T x S.

    If they are more than half of the slots, rows whose output is dropped are put before them, so that the fused causal kernel
    takes them; or else they attend in blocks. (One thread of a CPU, 9 heads: 2007 rows of 2048 slots 166 ms against 257 ms in
    blocks, 2048 of 4096 824 against 858, 1024 of 2048 237 against 177.)
    """
    batch, heads, tokens, width = query.shape
    slots = key.shape[2]
    if 2 * tokens <= slots or value.shape[-1] != width:  # the kernel needs values as wide as keys
        return in_blocks(query, key, value, None, scaling)
    padded = query.new_zeros(batch, heads, slots, width)
    padded[:, :, slots - tokens :] = query
    output = scaled_dot_product_attention(
        padded, key, value, is_causal=True, scale=scaling, enable_gqa=heads != key.shape[1]
    )
    return output[:, :, slots - tokens :].transpose(1, 2).contiguous()


def in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """Attention of many rows, a block of them at a time over the slots that the block sees; [B, T, groups * H, D].

    `mask` is [1, 1, T, S] booleans. A fused kernel goes through all slots of a masked row, also those beyond the row itself;
    a block needs those up to its last row only, and within a window not the first ones either. Exact up to rounding.
    """
    batch, heads, tokens, width = query.shape
    kept_heads, slots = key.shape[1], key.shape[2]
    groups = heads // kept_heads
    output = query.new_empty(batch, tokens, heads, value.shape[-1])
    for start in range(0, tokens, ROWS_IN_BLOCK):
        stop = min(start + ROWS_IN_BLOCK, tokens)
        rows = stop - start
        first, end, seen = _seen_by(mask, start, stop, tokens, slots, query.device)
        block = scaled_dot_product_attention(
            query[:, :, start:stop].reshape(batch, kept_heads, groups * rows, width),
            key[:, :, first:end],
            value[:, :, first:end],
            attn_mask=seen.expand(groups, rows, end - first).reshape(1, 1, groups * rows, end - first),
            scale=scaling,
        )
        output[:, start:stop] = block.reshape(batch, heads, rows, -1).transpose(1, 2)
    return output


def _seen_by(
    mask: torch.Tensor | None, start: int, stop: int, tokens: int, slots: int, device: torch.device
) -> tuple[int, int, torch.Tensor]:
    """The slots [first, end) that rows [start, stop) see any of, and [rows, end - first] booleans: which row sees which."""
    if mask is None:
        end = slots - tokens + stop
        return 0, end, tail_mask(stop - start, end, device)
    seen = mask[0, 0, start:stop, :slots]
    if device.type != "cpu":  # elsewhere, reading how far a mask reaches would wait for the device
        return 0, slots, seen
    columns = seen.any(dim=0).nonzero()
    first, end = int(columns[0]), int(columns[-1]) + 1
    return first, end, seen[:, first:end]
