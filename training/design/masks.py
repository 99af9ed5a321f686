"""Attention masks. A token reads an earlier, living token whose position is not later, if its part may read that part.

The sequence's table `TokenSequence.reads` says which part may read which:

    plain text   plain text
    a field      plain text, itself
    a reader     plain text, the fields that it reads, earlier readers that share a field with it, itself
    a skill      itself
    turns        everything
"""

from __future__ import annotations

import torch

from training.design.parts import TokenSequence


def allowed(sequence: TokenSequence, query: int, key: int) -> bool:
    """Return whether the token at index `query` reads the token at index `key`. This is the slow reference."""
    return bool(
        key <= query
        and sequence.positions[key] <= sequence.positions[query]
        and sequence.dead[key] > query
        and sequence.reads[sequence.part[query], sequence.part[key]]
    )


def visible(part: torch.Tensor, positions: torch.Tensor, dead: torch.Tensor, reads: torch.Tensor) -> torch.Tensor:
    """Return the mask of a batch, [B, 1, T, T], True where the row's token reads the column's.

    Every token sees itself, including padding, because a row that sees nothing would give NaN.

    Args:
        part, positions, dead: [B, T], int64. Padding tokens have the last part, which reads nothing and which nothing
            reads.
        reads: [B, P, P], bool.
    """
    batch, tokens = part.shape
    parts = reads.shape[-1]
    pair = part[:, :, None] * parts + part[:, None, :]
    mask = reads.reshape(batch, -1).gather(1, pair.reshape(batch, -1)).reshape(batch, tokens, tokens)
    index = torch.arange(tokens, device=part.device)
    mask &= index[None, :, None] >= index[None, None, :]
    mask &= positions[:, :, None] >= positions[:, None, :]
    mask &= dead[:, None, :] > index[None, :, None]
    mask |= torch.eye(tokens, dtype=torch.bool, device=part.device)
    return mask[:, None]
