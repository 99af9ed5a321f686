"""Attention for training on a CPU: torch's forward, and a backward as matrix products of blocks.

torch's own backward on a CPU also computes the masked upper triangle, and takes about twice as long.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "design_blocks"
_ROWS = 128
"""number of queries in one block, so that the scores of a few heads fit into a core's cache"""


def register() -> str:
    """Register the attention with transformers, and return its name for `attn_implementation`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Implement transformers' interface. Queries are [B, H, T, D]; keys and values may have fewer heads.

    Returns [B, T, H, D].
    """
    if not torch.is_grad_enabled() or options.get("dropout") or options.get("softcap"):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        plain: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return plain
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention(query, key, value, attention_mask, scale).transpose(1, 2), None


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Compute causal attention, [B, H, T, D].

    Args:
        query: [B, H, T, D].
        key, value: [B, K, T, D]; H is a multiple of K.
        mask: [B, 1, T, T], True where the row reads the column. Each row must read itself and no later column.
            None: each row reads itself and all earlier columns.
        scale: factor of the scores.
    """
    tokens = query.shape[2]
    if mask is None:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()[None, None]
    # The mask as a bias that is added to the scores, in their dtype. Made once, not in the forward and in each block.
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, float("-inf"))
    attended: torch.Tensor = _Attention.apply(query, key, value, bias, scale)  # type: ignore[no-untyped-call]
    return attended


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, bias)
        ctx.scale = scale
        shared = query.shape[1] // key.shape[1]
        return scaled_dot_product_attention(
            query,
            key.repeat_interleave(shared, 1),
            value.repeat_interleave(shared, 1),
            attn_mask=bias.expand(len(query), -1, -1, -1),
            scale=scale,
        )

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradients block by block.

        Queries that share a key head are rows of one product, and the product's sum over rows is the sum over heads.
        """
        query, key, value, bias = ctx.saved_tensors
        (gradient,) = gradients
        batch, heads, tokens, width = query.shape
        pairs = batch * key.shape[1]
        keys, values = key.reshape(pairs, tokens, width), value.reshape(pairs, tokens, width)
        scaled = query * ctx.scale
        of_query = torch.empty_like(query)
        # The sum over blocks is in float32 or better.
        wide = torch.promote_types(query.dtype, torch.float32)
        of_key, of_value = (torch.zeros(keys.shape, dtype=wide, device=keys.device) for _ in range(2))
        for start in range(0, tokens, _ROWS):
            stop = min(start + _ROWS, tokens)
            rows = scaled[:, :, start:stop].reshape(pairs, -1, width)
            given = gradient[:, :, start:stop].reshape(pairs, -1, width)
            shape = batch, heads, stop - start, stop
            scores = (rows @ keys[:, :stop].mT).view(shape)
            shares = scores.add_(bias[:, :, start:stop, :stop]).softmax(-1)
            of_shares = (given @ values[:, :stop].mT).view(shape)
            of_scores = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype).view(pairs, -1, stop)
            of_value[:, :stop] += shares.view(pairs, -1, stop).mT @ given
            of_key[:, :stop] += of_scores.mT @ rows
            of_query[:, :, start:stop] = (of_scores @ keys[:, :stop]).view(batch, heads, -1, width)
        return (
            of_query.mul_(ctx.scale),
            of_key.to(key.dtype).view(key.shape),
            of_value.to(value.dtype).view(value.shape),
            None,
            None,
        )
