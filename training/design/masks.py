"""Who reads whom. A token reads an earlier, living token that stands no later in position, if its part may read that part.

Which part may read which is a table of the sequence (`TokenSequence.reads`):

    plain text   plain text
    a field      plain text, itself
    a reader     plain text, the fields it is a reader of, readers that share a field with it, itself
    a skill      itself
    turns        everything
"""

from __future__ import annotations

import torch

from training.design.parts import TokenSequence


def allowed(sequence: TokenSequence, query: int, key: int) -> bool:
    """Whether the token at index `query` reads the one at index `key`. The slow reference."""
    return bool(
        key <= query
        and sequence.positions[key] <= sequence.positions[query]
        and sequence.dead[key] > query
        and sequence.reads[sequence.part[query], sequence.part[key]]
    )


def visible(part: torch.Tensor, positions: torch.Tensor, dead: torch.Tensor, reads: torch.Tensor) -> torch.Tensor:
    """The same for a batch: [B, 1, T, T], True where the row's token reads the column's.

    Args:
        part, positions, dead: [B, T], int64. A padding token has the last part, which reads nothing and is read by nobody.
        reads: [B, P, P], bool.

    Every token sees itself, padding too: a row that sees nothing would be NaN.
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
