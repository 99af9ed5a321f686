"""Attention in blocks of rows, attention with a soft cap, and a recorder of the last row's attention.

Inside its block and its thread, `recording` collects the attention of a forward's last row in every layer that runs
this package's attention (`transformers_api.grouped_sdpa`). The model is not changed.

Shapes: query [B, groups * H, T, D], key and value [B, H, S, D], mask [B, 1, T, S] or None (then causal, the last rows
of S).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

ROWS_IN_BLOCK = 256
"""Rows in one block. Smaller blocks skip more of the slots that they cannot see, but need more calls. Measured on a CPU
with 2048 rows, 8192 slots and 9 heads: 64 rows 913 ms, 128 812 ms, 256 496 ms, 512 589 ms, all at once 1042 ms."""


@dataclass(frozen=True, slots=True, eq=False)
class LastRow:
    """The attention of a forward's last row in one layer."""

    query: torch.Tensor
    """[groups * H, D]"""
    scores: torch.Tensor
    """[groups * H, S] in float32 or wider, after the soft cap; minus infinity where a slot is masked"""
    scaling: float
    softcap: float | None

    @property
    def weights(self) -> torch.Tensor:
        """[groups * H, S]"""
        return self.scores.softmax(dim=-1)


_recorder: ContextVar[list[LastRow] | None] = ContextVar("recorder", default=None)


@contextmanager
def recording() -> Iterator[list[LastRow]]:
    """Collect the last row's attention inside the block: one entry for each layer, in order."""
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
    """Record the last row's attention if a `recording` block is active."""
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
    """The causal mask of rows that occupy the last slots, [rows, slots] booleans."""
    return torch.ones(rows, slots, dtype=torch.bool, device=device).tril(slots - rows)


def soft_capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    """Attention with soft-capped scores, [B, T, groups * H, D]. All scores are in memory: [B, groups * H, T, S]."""
    batch, heads, tokens, _ = query.shape
    weights = attention_weights(query, key, mask, scaling, softcap).to(value.dtype)
    groups = heads // key.shape[1]
    folded = weights.view(batch, key.shape[1], groups * tokens, key.shape[2])
    return torch.matmul(folded, value).view(batch, heads, tokens, value.shape[-1]).transpose(1, 2).contiguous()


def last_rows(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """Causal attention of rows that occupy the last slots, [B, T, groups * H, D], without a mask of T x S.

    Rows that fill more than half of the slots are padded in front to all slots, so that the fused causal kernel accepts
    them, and the output of the padding is dropped. Fewer rows attend in blocks. Measured on one CPU thread with 9
    heads, padded against in blocks: 2007 rows of 2048 slots 166 ms against 257 ms, 2048 of 4096 824 against 858, 1024
    of 2048 237 against 177.
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
    """Attention of many rows, one block at a time over the slots that the block sees; [B, T, groups * H, D].

    `mask` is [1, 1, T, S] booleans, or None for the causal mask of the last slots. A fused kernel computes all slots of
    a masked row, including those after the row. A block computes only the slots up to its last row, and with a sliding
    window also skips the first ones. Exact up to rounding.
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
    """The range [first, end) of slots that rows [start, stop) see, and their mask [rows, end - first], booleans."""
    if mask is None:
        end = slots - tokens + stop
        return 0, end, tail_mask(stop - start, end, device)
    seen = mask[0, 0, start:stop, :slots]
    if device.type != "cpu":  # on other devices, reading the extent of the mask would wait for the device
        return 0, slots, seen
    columns = seen.any(dim=0).nonzero()
    first, end = int(columns[0]), int(columns[-1]) + 1
    return first, end, seen[:, first:end]
