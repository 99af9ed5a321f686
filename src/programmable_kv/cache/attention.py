"""Attention as a formula: what the last row of a forward attends to, and scores with a soft cap.

`recording` collects, within its block and its thread, the attention weights of the last row in every layer that runs this
package's attention (`transformers_api.grouped_sdpa`). Nothing of the model is changed.

Shapes: query [B, groups * H, T, D], key and value [B, H, S, D], mask [B, 1, T, S] or None (then causal, the last rows of S).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_recorder: ContextVar[list[torch.Tensor] | None] = ContextVar("recorder", default=None)


@contextmanager
def recording() -> Iterator[list[torch.Tensor]]:
    """Collect the last row's attention weights, [groups * H, S] in float32 or wider, one for each layer in order."""
    weights: list[torch.Tensor] = []
    token = _recorder.set(weights)
    try:
        yield weights
    finally:
        _recorder.reset(token)


def record(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> None:
    """Note what the last row attends to, if somebody collects it."""
    recorder = _recorder.get()
    if recorder is not None:
        last = None if mask is None else mask[..., -1:, :]
        recorder.append(attention_weights(query[:, :, -1:], key, last, scaling, softcap)[0, :, 0])


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """softmax(cap(q k^T scale) + mask) in float32 or wider, [B, groups * H, T, S].

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
        mask = torch.ones(tokens, slots, dtype=torch.bool, device=query.device).tril(slots - tokens)
    if mask is not None:
        mask = mask[..., :slots]
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1)


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
